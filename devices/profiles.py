"""The profile: what was measured of a model on a device, and how; all that the pruner's cost is made from.

`devices/profile.schema.json` is its JSON Schema. Files come from other people and are checked when they are read.
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from comp_edge.files import write_json
from comp_edge.plan import Plan
from devices.errors import DeviceError
from devices.record import Count, DeviceRecord, Strict
from devices.timing import percentile

NEW_TOKENS = 16  # room for an answer, where nothing else is said
SIZE_LIMIT = 256 * 2**20  # bytes of a profile file
Milliseconds = Annotated[float, Field(ge=0, lt=1e8, allow_inf_nan=False)]
Name = Annotated[str, Field(max_length=256)]


class Measurement(Strict):
    """Milliseconds a call of one method, by round.

    What a call takes when nothing disturbs it, and how far that spreads, is said by the calls that nothing disturbed as far as
    could be seen; percentiles are of all calls that were made, for a device that throttles does so to whoever uses it.

    Attributes:
        rounds: undisturbed calls of each round that counts; where such rounds are too few, all calls of the fastest others.
        disturbed: all other calls: beside a beat or an anchor that was slow.
        rejected: how many rounds were repeated because something disturbed them.
        settled: False where rounds were still disturbed, or did not agree, when no more repetitions were allowed.
        anchor_ms: of each round that counts: what the anchor took beside it, where that was quiet.
        taken_ms: all rounds together: loading, warming up, calls and the beats between them.
    """

    rounds: Annotated[tuple[Annotated[tuple[Milliseconds, ...], Field(min_length=1)], ...], Field(min_length=1)]
    disturbed: tuple[Milliseconds, ...] = ()
    rejected: Count = 0
    settled: bool = True
    anchor_ms: tuple[Milliseconds | None, ...] = ()
    taken_ms: Milliseconds | None = None
    load_ms: Milliseconds | None = None
    first_ms: Milliseconds | None = None
    peak_rss_kb: Count | None = None

    @property
    def samples(self) -> list[float]:
        """All calls, ascending."""
        return sorted([*self.disturbed, *(sample for samples in self.rounds for sample in samples)])

    @property
    def steady(self) -> float:
        """What a call takes when nothing slows it: the fastest of the second fastest round, since one may be lucky.

        Of rounds that were disturbed or do not agree the fastest of all: nothing makes a device faster than it is.
        """
        return self._fastest[: 1 + self.settled][-1]

    def percentile(self, percent: float) -> float:
        """Nearest rank, over all calls."""
        return percentile(self.samples, percent)

    @property
    def noise(self) -> float:
        """Relative spread of the fastest calls of the faster half of the rounds (standard deviation over mean); 0 for one."""
        fastest = self._fastest[: len(self.rounds) // 2 + 1]
        mean = statistics.mean(fastest)
        return statistics.stdev(fastest) / mean if len(fastest) > 1 and mean else 0.0

    @property
    def _fastest(self) -> list[float]:
        """Every round's fastest call, ascending."""
        return sorted(min(samples) for samples in self.rounds)


class Point(Strict):
    """One program that was measured.

    Attributes:
        kind: "block": a model of few layers, for what a layer costs; "whole": all layers, for what blocks cannot show
            (weights do not stay in the caches).
        layers: layers of each stream of the model that was measured; its other dimensions are the model's.
        plan: what was kept, and the token schedule; `plan.streams` have `layers` layers.
        methods: what was measured, by the method's name in the program.
    """

    id: Name
    kind: Literal["block", "whole"]
    layers: dict[str, Count]
    plan: dict[str, Any]
    methods: dict[Name, Measurement]

    @model_validator(mode="after")
    def _fits(self) -> Point:
        plan = self.parsed_plan()
        for name, stream in plan.streams.items():
            if len(stream.layers) != self.layers.get(name):
                raise ValueError(
                    f"{len(stream.layers)} layers are planned in stream {name!r}, {self.layers.get(name)} measured"
                )
        return self

    def parsed_plan(self) -> Plan:
        """The plan, validated."""
        return Plan.parse(self.plan, where=f"plan of point {self.id!r}")


class ModelRecord(Strict):
    """The dense model: what costs are computed from needs its shapes, never its weights.

    Attributes:
        config: transformers' configuration as JSON, `architectures` included.
        text_tokens: of the longest prompt that programs were made for.
        new_tokens: that programs have room for after the prompt; `decode` attends to all of that room.
    """

    name: str = Field(max_length=4096)
    model_type: Name
    config: dict[str, Any]
    text_tokens: Count
    new_tokens: Count


class Settings(Strict):
    """How it was measured."""

    preset: Name
    agent: Name
    runtime: Name
    threads: Annotated[int, Field(ge=1, le=4096)]
    cpus: tuple[Count, ...] = ()
    backend: Name = "xnnpack"
    precision: Name = "float32"
    clocks_set: bool = False


class Profile(Strict):
    """Everything that was measured of a model on a device.

    Attributes:
        seconds: the device was busy for so long, in all runs together.
        conditions: what sensors said, in the order of time (see `devices.conditions`); each with `time`, `when` and what
            was read.
        complete: every point that was chosen has been measured.
    """

    schema_: Literal[1] = Field(default=1, alias="schema")
    created: Name
    device: DeviceRecord
    model: ModelRecord
    settings: Settings
    points: tuple[Point, ...] = ()
    conditions: tuple[dict[str, Any], ...] = ()
    seconds: Annotated[float, Field(ge=0)] = 0.0
    complete: bool = False

    @property
    def measurements(self) -> int:
        """Methods that were timed."""
        return sum(len(point.methods) for point in self.points)

    @property
    def overhead(self) -> float | None:
        """What else the device was busy with, as a share of what measurements took; None where that was not counted.

        It is what a profile costs more than timing each program alone: anchors, starting and cleaning up, reading conditions.
        """
        taken = [m.taken_ms for point in self.points for m in point.methods.values()]
        if not taken or None in taken or not sum(taken):
            return None
        return self.seconds * 1000 / sum(taken) - 1

    @classmethod
    def load(cls, path: str | Path) -> Profile:
        """Read a file.

        Raises:
            DeviceError: missing, too large, not JSON, of another schema, or inconsistent; says where.
        """
        path = Path(path)
        try:
            if path.stat().st_size > SIZE_LIMIT:
                raise DeviceError(f"profile {str(path)!r} is larger than {SIZE_LIMIT // 2**20} MiB.")
            value = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise DeviceError(
                f"profile {str(path)!r} does not exist; make one with python -m devices profile."
            ) from None
        except (OSError, ValueError, RecursionError) as error:
            raise DeviceError(f"profile {str(path)!r} cannot be read: {error}.") from None
        return cls.parse(value, where=f"profile {str(path)!r}")

    @classmethod
    def parse(cls, value: Any, *, where: str = "profile") -> Profile:
        """A profile from decoded JSON; `where` names it in errors."""
        if not isinstance(value, dict) or value.get("schema") != 1:
            found = value.get("schema") if isinstance(value, dict) else type(value).__name__
            raise DeviceError(f"{where} has schema {found!r}; this version reads schema 1.")
        try:
            return cls.model_validate(value)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(str(part) for part in first["loc"]) or "profile"
            raise DeviceError(f"{where}: {place}: {first['msg'].removeprefix('Value error, ')}.") from None

    def save(self, path: str | Path) -> None:
        """Write it; the file appears whole or stays what it was."""
        write_json(Path(path), self.to_json())

    def to_json(self) -> dict[str, Any]:
        """The JSON object of schema 1."""
        return self.model_dump(mode="json", by_alias=True)


if __name__ == "__main__":  # the schema that is shipped, written anew
    write_json(Path(__file__).with_name("profile.schema.json"), Profile.model_json_schema(by_alias=True))
