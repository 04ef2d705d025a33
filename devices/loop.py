"""Closing the loop: the cost that a pruner asks, predicted from a profile and measured on the device while it is attached."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from comp_edge.errors import InputError
from comp_edge.plan import Plan
from devices.depth import config_from
from devices.device import connect
from devices.errors import DeviceError, DeviceGone
from devices.latency import LatencyModel
from devices.latency.program import Program
from devices.measuring import preset_named
from devices.profiles import Measurement, Profile
from devices.profiling import doubts
from devices.programs import Subject
from devices.sitting import Sitting, sit

Answered = TypeVar("Answered")


class DeviceCost:
    """A `comp_edge.cost.Cost` in milliseconds of a request; `measure` asks the device itself.

    Args:
        profile: or its file.
        decode_tokens: tokens that a request generates after the first.
        attached: whether the profile's device is there to be asked; without it predictions are all that there is.

    Attributes:
        notes: why the device is not asked, a sentence each.

    Raises:
        DeviceError: the profile cannot be used, or is of a model that generates nothing and `decode_tokens` are asked for.
    """

    def __init__(self, profile: Profile | str | Path, *, decode_tokens: int = 0, attached: bool = True) -> None:
        profile = profile if isinstance(profile, Profile) else Profile.load(profile)
        self.model = LatencyModel.fit(profile).with_decode_tokens(decode_tokens)
        self.attached = attached
        self.measured: list[dict[str, Any]] = []
        self.notes: list[str] = []

    @property
    def name(self) -> str:
        """What plans call this cost."""
        return self.model.name

    def predict(self, plan: Plan) -> float:
        """Milliseconds of one request under a plan, as predicted from the profile.

        Raises:
            InputError: the plan is not of the measured model.
        """
        try:
            return self.model.predict(plan)
        except DeviceError as error:
            raise InputError(str(error)) from None

    def measure(self, plan: Plan) -> float | None:
        """Milliseconds of one request under a plan, measured now; None where the device is not attached, or not any more.

        Raises:
            InputError: the device is there, but the program does not run on it.
        """
        with _input_errors():
            found = self._ask(lambda sitting: sitting.time(self.subject, plan))
        if found is None:
            return None
        took = request_ms(self.model, plan, found)
        self.measured.append(
            {
                "ms": took,
                "predicted_ms": self.predict(plan),
                "methods": {method: measurement.steady for method, measurement in found.items()},
                "settled": all(measurement.settled for measurement in found.values()),
            }
        )
        return took

    def reach(self) -> None:
        """Find out, before anything rests on it, whether the device can be asked; where it is not attached `notes` say so.

        Raises:
            InputError: it is there, or may be, and cannot time a program; or the profile's model cannot be had.
        """
        with _input_errors():
            if self._ask(lambda sitting: sitting.first) is not None:
                _ = self.subject

    def _ask(self, question: Callable[[Sitting], Answered]) -> Answered | None:
        """What the device says, if it is attached, and is the one that the profile is of."""
        profile, settings = self.model.profile, self.model.profile.settings
        if self.attached and settings.clocks_set:
            return self._detach("its profile was measured with fixed clocks, which nobody fixes here")
        if not self.attached:
            return None
        options = {"agent": settings.agent, "threads": settings.threads, "cpus": settings.cpus}
        try:
            with connect(profile.device.address) as device:
                if other := next(profile.device.unlike(device.info()), None):
                    name, then, now = other
                    return self._detach(f"{name} is {now!r} there, and {then!r} in the profile")
                with sit(device, preset=preset_named(settings.preset), **options) as sitting:
                    runtime = sitting.first.runtime
                    if runtime != settings.runtime:
                        return self._detach(f"it runs {runtime!r}, the profile was measured with {settings.runtime!r}")
                    return question(sitting)
        except DeviceGone as error:
            return self._detach(str(error).rstrip("."))

    def _detach(self, reason: str) -> None:
        self.attached = False
        address = self.model.profile.device.address
        self.notes.append(f"{address} is not asked, predictions are all that there is: {reason}.")

    @cached_property
    def subject(self) -> Subject:
        """The profile's model, as it was measured."""
        record = self.model.profile.model
        subject = Subject.of(record.name, new_tokens=record.new_tokens)
        return subject.with_config(config_from(record.config, where=f"model {record.name!r} of the profile"))

    def describe(self, dense: Plan, plan: Plan) -> dict[str, Any]:
        """Device, conditions, how good the model is and where the time goes: for metrics.json and the report."""
        profile, report = self.model.profile, self.model.report()
        return {
            "device": profile.device.model_dump(mode="json"),
            "settings": profile.settings.model_dump(mode="json"),
            "conditions": [*profile.conditions[:1], *profile.conditions[1:][-1:]],
            "decode_tokens": self.model.decode_tokens,
            "device_seconds": profile.seconds,
            "measurements": profile.measurements,
            "held_out": report["whole"],
            "warnings": [*self.notes, *doubts(profile), *report["warnings"], *self.model.check(plan)],
            "predicted_ms": {"dense": self.predict(dense), "pruned": self.predict(plan)},
            "uncertainty_ms": self.model.uncertainty(plan),
            "measured": self.measured,
            "methods": {"dense": self.model.parts(dense), "pruned": self.model.parts(plan)},
            "layers": {
                name: [cost._asdict() for cost in self.model.by_layer(of)]
                for name, of in (("dense", dense), ("pruned", plan))
            },
        }


def cost_of(profile: str, *, model: Any, decode_tokens: int, attached: bool) -> DeviceCost:
    """What `comp-edge prune --device` asks for, through the entry point `comp_edge.costs`.

    Args:
        model: that is to be pruned.

    Where the device is not attached, or is not the profile's, stderr says so.

    Raises:
        InputError: see `DeviceCost` and `DeviceCost.reach`; or the profile is of another model.
    """
    with _input_errors():
        cost = DeviceCost(profile, decode_tokens=decode_tokens, attached=attached)
    record = cost.model.profile.model
    if cost.model.program.shapes != Program(model, room=record.new_tokens).shapes:
        raise InputError(f"profile {profile!r} is of {record.name!r}, whose layers have other sizes than the model's.")
    try:
        cost.reach()
    except InputError as error:
        raise InputError(f"{error} Or leave the device out of it, with --no-measure.") from None
    for note in cost.notes:
        print(f"warning: {note}", file=sys.stderr)
    return cost


def request_ms(model: LatencyModel, plan: Plan, timing: Mapping[str, Measurement]) -> float:
    """Milliseconds of a request whose methods were measured."""
    calls = model.program.calls(plan, model.decode_tokens)
    return sum(count * timing[method].steady for method, count in calls.items() if count and method in timing)


@contextmanager
def _input_errors() -> Iterator[None]:
    """What is wrong with a device, as the pruner's error."""
    try:
        yield
    except DeviceError as error:
        raise InputError(str(error)) from None
