"""Measuring a profile: choose points, lower, time, save after each; a run that was killed goes on where it was."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

from comp_edge.files import check_writable
from devices.conditions import changed, fixed_clocks
from devices.device import Device, connect
from devices.errors import DeviceError
from devices.measuring import preset_named
from devices.points import PointSpec, choose_points
from devices.profiles import NEW_TOKENS, ModelRecord, Point, Profile, Settings
from devices.programs import Subject
from devices.record import DeviceRecord
from devices.sitting import Sitting, sit

BACKENDS = {"pte": "xnnpack", "onnx": "tensorrt"}  # what runs programs of each form
Progress = Callable[[int, int, str], None]  # points done, of how many, what is going on


def profile(
    device: Device | str,
    model: str | Path | Subject,
    *,
    out: str | Path | None = None,
    preset: str = "quick",
    agent: str = "native",
    threads: int = 1,
    cpus: tuple[int, ...] = (),
    prompt_tokens: int | None = None,
    new_tokens: int = NEW_TOKENS,
    set_clocks: bool = False,
    jobs: int = 1,
    points: list[PointSpec] | None = None,
    on_progress: Progress = lambda done, total, text: None,
) -> Profile:
    """Measure what pruned forms of a model take on a device.

    The file `out` is written after every point. Where it is there already, of the same device, model and settings, only the
    points that are missing are measured.

    Args:
        device: or its address.
        model: whatever names a model (a folder, a reference model, a hub id, `random:SHAPE`); its weights are not used.
        preset: "quick", or "report" (at least 1,024 samples or a minute for each method).
        agent: "native", "python" or "trtexec" (see `Device.agent`).
        threads: of the runtime; `cpus` are the cores that it is bound to.
        prompt_tokens: text tokens of the longest prompt, and `new_tokens`: room for the answer.
        set_clocks: fix the device's clocks while it is measured; they are put back afterwards.
        jobs: processes that lower programs; all of them rest while one is timed. With more than one, a script needs the usual
            `if __name__ == "__main__":`.
        points: what to measure instead of what `devices.points` chooses.

    Raises:
        DeviceError: the device cannot be used or has gone; `out` is a profile of something else. What was measured until
            then is in `out`.
        InputError: there is no such model.
    """
    if isinstance(device, str):
        with connect(device) as connected:
            return profile(
                connected, model, out=out, preset=preset, agent=agent, threads=threads, cpus=cpus, prompt_tokens=prompt_tokens,
                new_tokens=new_tokens, set_clocks=set_clocks, jobs=jobs, points=points, on_progress=on_progress,
            )  # fmt: skip
    chosen = preset_named(preset)
    if out is not None:
        if Path(out).is_dir():
            raise DeviceError(f"output {str(out)!r} is a folder; give a file.")
        check_writable(Path(out).absolute().parent)
    if not isinstance(model, Subject):
        model = Subject.of(model, text_tokens=prompt_tokens, new_tokens=new_tokens)
    points = choose_points(model) if points is None else points
    found = None if out is None or not Path(out).exists() else Profile.load(out)
    given = {"preset": preset, "agent": agent, "threads": threads, "cpus": cpus, "clocks_set": set_clocks}
    on_progress(0, len(points), f"reach {device.address}")
    if found is not None and found.complete and {p.id for p in points} <= {p.id for p in found.points}:
        settings = Settings(runtime=found.settings.runtime, backend=found.settings.backend, **given)
        _check_same(found, device.info(), model.record, settings, points, where=out)
        return found
    with sit(device, preset=chosen, agent=agent, threads=threads, cpus=cpus) as sitting:
        settings = Settings(runtime=sitting.first.runtime, backend=BACKENDS[sitting.form], **given)
        if found is None:
            created = datetime.now(UTC).isoformat(timespec="seconds")
            found = Profile(schema=1, created=created, device=device.info(), model=model.record, settings=settings)
        else:
            _check_same(found, device.info(), model.record, settings, points, where=out)
        session = _Session(found, out, device, sitting)
        with fixed_clocks(device.transport, device.kind) if set_clocks else nullcontext():
            session.run(model, points, jobs, on_progress)
    return session.profile


def _check_same(
    found: Profile,
    device: DeviceRecord,
    model: ModelRecord,
    settings: Settings,
    points: list[PointSpec],
    *,
    where: str | Path,
) -> None:
    """Check that a profile is of these, and has the plans of those points that it has.

    Raises:
        DeviceError: it is of something else.
    """
    others = [("device", *other) for other in found.device.unlike(device)]
    for what, have, wanted in (("model", found.model, model), ("settings", found.settings, settings)):
        others += [(what, name, getattr(have, name), value) for name, value in wanted if getattr(have, name) != value]
    for what, name, have, value in others:
        raise DeviceError(
            f"{str(where)!r} is a profile with {what} {name} {_short(have)}, this run has {_short(value)}; give the same, or "
            "another output."
        )
    chosen = {point.id: point.plan for point in points}
    for point in found.points:
        if point.id in chosen and point.parsed_plan() != chosen[point.id]:
            raise DeviceError(
                f"{str(where)!r} measured another plan as point {point.id!r} than this version does; give another output."
            )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 80 else text[:76] + " ..."


def doubts(measured: Profile) -> list[str]:
    """What makes a profile doubtful, by the device's conditions from its beginning to its end; a sentence each.

    Neighbours are compared, too: a device that throttles for an hour may be as cool at the end as it was at the beginning.
    """
    found = list(measured.conditions)
    if len(found) < 2:
        return []
    # Later on the load is that of the measurement itself.
    pairs = [(found[0], found[-1]), *((before | {"load": None}, after) for before, after in pairwise(found))]
    return list(dict.fromkeys(sentence for pair in pairs for sentence in changed(*pair)))


class _Session:
    """One run of `profile` on a device."""

    def __init__(self, begun: Profile, out: str | Path | None, device: Device, sitting: Sitting) -> None:
        self.profile, self.out, self.device, self.sitting = begun, out, device, sitting
        self.before = begun.seconds  # of earlier runs

    def run(self, model: Subject, points: list[PointSpec], jobs: int, on_progress: Progress) -> None:
        done = {point.id for point in self.profile.points}
        missing = [point for point in points if point.id not in done]
        self._note("begin")

        def progress(index: int, text: str) -> None:
            on_progress(len(points) - len(missing) + index, len(points), f"{missing[index].id}: {text}")

        timings = self.sitting.time_each(model, [spec.wanted for spec in missing], jobs=jobs, progress=progress)
        for spec, found in zip(missing, timings, strict=True):
            point = Point(id=spec.id, kind=spec.kind, layers=spec.layers, plan=spec.plan.to_json(), methods=found)
            self.profile = self.profile.model_copy(update={"points": (*self.profile.points, point)})
            self._note(f"after {spec.id}")
        self.profile = self.profile.model_copy(update={"complete": True})
        self._save()
        on_progress(len(points), len(points), "done")

    def _note(self, when: str) -> None:
        """Book the device's time and conditions, and save."""
        with self.sitting.agent.running():
            entry = {"time": time.time(), "when": when, **self.device.conditions()}
        self.profile = self.profile.model_copy(
            update={
                "conditions": (*self.profile.conditions, entry),
                "seconds": self.before + self.sitting.agent.seconds,
            }
        )
        self._save()

    def _save(self) -> None:
        if self.out is not None:
            self.profile.save(self.out)
