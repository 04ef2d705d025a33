"""Energy of a run on a Jetson, from the power that its INA sensors report while it goes on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby, pairwise

from devices.conditions import tegrastats
from devices.errors import DeviceError

# The whole module: one sensor at its input, or else the sum of those that no other contains (on AGX boards).
_INPUTS = ("VDD_IN", "POM_5V_IN", "VIN")
_SUMS = (
    ("VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0"),
    ("GPU", "CPU", "SOC", "CV", "VDDRQ", "SYS5V"),
)

# $1: milliseconds, $2: the log; the command follows. tegrastats is ended however the command ends.
_BESIDE = r"""
tegrastats --interval "$1" --logfile "$2" < /dev/null > /dev/null 2>&1 &
meter=$!
trap 'kill "$meter" 2> /dev/null' EXIT
trap 'exit 143' HUP INT TERM
shift 2
"$@"
"""


@dataclass(frozen=True)
class Energy:
    """What a run took.

    Attributes:
        seconds: between the first sample and the last.
        samples: how often power was read.
        joules: of each rail. Rails overlap: they must not be added up.
    """

    seconds: float
    samples: int
    joules: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, times: Sequence[float], powers: Sequence[Mapping[str, float]]) -> Energy:
        """Integrate power between samples, as if it changed evenly (trapezoids).

        Args:
            times: seconds, ascending.
            powers: milliwatts by rail, at those times; a rail that a sample lacks has no energy at all.

        Raises:
            DeviceError: fewer than two samples, or times that go back.
        """
        if len(times) != len(powers) or len(times) < 2:
            raise DeviceError(
                f"{len(times)} times and {len(powers)} samples of power; two of each are needed at least."
            )
        for before, after in pairwise(times):
            if after < before:
                raise DeviceError(f"power was sampled at {after:g} s after {before:g} s; times must rise.")
        rails = set.intersection(*(set(power) for power in powers))
        joules = {
            rail: sum(
                (end - start) * (first[rail] + second[rail]) / 2e3
                for (start, end), (first, second) in zip(pairwise(times), pairwise(powers), strict=True)
            )
            for rail in sorted(rails)
        }
        return cls(seconds=times[-1] - times[0], samples=len(times), joules=joules)

    @classmethod
    def of_tegrastats(cls, lines: Iterable[str], *, interval: float | None = None) -> Energy:
        """From the lines of a log.

        Args:
            interval: seconds between lines; None: by the date in front of each. It has whole seconds only, so that lines
                of one second are spread over it.

        Raises:
            DeviceError: fewer than two lines with power, or no dates where they are needed.
        """
        samples = []
        for line in lines:
            try:
                sample = tegrastats.parse(line)
            except ValueError:
                continue  # the last line of a log may be half a line
            if sample.rails:
                samples.append(sample)
        stamps = [sample.stamp for sample in samples]
        if interval is not None:
            times = [index * interval for index in range(len(samples))]
        elif None in stamps:
            raise DeviceError(
                "lines of tegrastats have no date (before JetPack 5); the interval between them is needed."
            )
        else:
            times = _spread([stamp for stamp in stamps if stamp is not None])
        return cls.of(times, [{name: rail.now_mw for name, rail in sample.rails.items()} for sample in samples])

    @property
    def board_joules(self) -> float | None:
        """Of the whole module; None where it is not known which rails make it up."""
        for rail in _INPUTS:
            if rail in self.joules:
                return self.joules[rail]
        for rails in _SUMS:
            if all(rail in self.joules for rail in rails):
                return sum(self.joules[rail] for rail in rails)
        return None

    def to_json(self) -> dict[str, object]:
        """Plain data, for a profile's conditions or a report."""
        return {
            "seconds": self.seconds,
            "samples": self.samples,
            "joules": dict(self.joules),
            "board_joules": self.board_joules,
        }


def beside_tegrastats(command: Sequence[str], log: str, *, interval_ms: int = 100) -> list[str]:
    """A command for a Jetson that runs `command` while tegrastats writes its lines to the file `log` there.

    Its output and exit code are those of `command`.
    """
    return ["sh", "-c", _BESIDE, "sh", str(interval_ms), log, *command]


def _spread(stamps: Sequence[int]) -> list[float]:
    """Whole seconds, those that are equal spread evenly over their second."""
    times: list[float] = []
    for second, group in groupby(stamps):
        count = len(list(group))
        times.extend(second + index / count for index in range(count))
    return times
