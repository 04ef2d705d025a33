"""`python -m runtime_tests BUNDLE`"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from devices.errors import DeviceError
from export.bundle import Bundle, BundleError, find_bundles
from export.executorch.runner import silenced_output
from runtime_tests.checks import Check, run_checks
from runtime_tests.measure import UNITS, Latency, Memory, measure_latency, measure_memory

NAME = "python -m runtime_tests"
EXAMPLE = """examples:
  python -m runtime_tests bundle
  python -m runtime_tests bundle/scheduled --against dense_bundle/scheduled --json
"""


@dataclass
class Report:
    """What was found out about one bundle."""

    folder: Path
    checks: list[Check]
    runner: Any = None
    latency: Latency | None = None
    memory: Memory | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return all(check.status != "fail" for check in self.checks)

    @property
    def profile(self) -> str:
        return self.runner.bundle.manifest.profile if self.runner else "unknown"

    @property
    def timeable(self) -> bool:
        """Whether this machine can say how fast it is: an interpreter's time says nothing."""
        return self.runner is not None and self.runner.bundle.manifest.backend == "executorch"

    def to_json(self) -> dict[str, Any]:
        return {
            "path": str(self.folder),
            "profile": self.profile,
            "ok": self.ok,
            "checks": [check.to_json() for check in self.checks],
            "latency_ms": self.latency.to_json() if self.latency else None,
            "memory": self.memory.to_json() if self.memory else None,
            "notes": self.notes,
        }


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        self.exit(2, f"{NAME}: {message}. See '{NAME} --help'.\n")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parse = _Parser(
        prog=NAME,
        description="Check that a bundle is whole and right, and measure latency and peak memory.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parse.add_argument("bundle", type=Path, metavar="BUNDLE", help="a bundle, or a folder of bundles")
    parse.add_argument("--device", default="host", help="where to run (default: host)")
    parse.add_argument(
        "--against",
        type=Path,
        metavar="BUNDLE",
        help="another bundle (the dense model's, say), timed in turns with this one in the same process",
    )
    parse.add_argument("--threads", type=int, default=1, metavar="N", help="threads to time with (default: 1)")
    parse.add_argument("--rounds", type=int, default=20, metavar="N", help="rounds of timing; 0: none (default: 20)")
    parse.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    return parse


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the exit code: 0 all passed, 1 something failed, 2 bad input."""
    args = parser().parse_args(argv)
    try:
        return _run(args)
    except (BundleError, DeviceError) as error:
        print(f"{NAME}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{NAME}: interrupted.", file=sys.stderr)
        return 130


def _run(args: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.progress import track

    from devices.device import connect
    from devices.program import set_threads

    if args.threads < 1 or args.rounds < 0:
        raise BundleError(f"--threads {args.threads} must be at least 1 and --rounds {args.rounds} at least 0.")
    if args.device != "host":
        raise DeviceError(f"device {args.device!r} was given; these tests run on this machine: --device host.")
    folders = find_bundles(args.bundle)
    against = _matching(folders, find_bundles(args.against)) if args.against else {}
    with silenced_output():
        set_threads(args.threads)
    reports = [_check(folder) for folder in folders]
    others = {folder: _check(other) for folder, other in against.items()}
    timed = {str(r.folder): r for r in [*reports, *others.values()] if r.timeable}
    if args.rounds and timed:
        turns = iter(track(range(args.rounds), description="timing", console=Console(stderr=True), transient=True))
        next(turns)

        def progress() -> None:
            next(turns, None)

        _measure(timed, rounds=args.rounds, threads=args.threads, progress=progress)
    ratios = {
        str(report.folder): _ratio(others[report.folder], report) for report in reports if report.folder in others
    }
    # A reference that is itself broken makes the ratio worthless.
    ok = all(report.ok for report in [*reports, *others.values()])
    if args.json:
        result = {
            "ok": ok,
            "device": connect("host").info().model_dump(mode="json"),
            "threads": args.threads,
            "bundles": [report.to_json() for report in reports],
            "against": [report.to_json() for report in others.values()],
            "speedup": ratios,
        }
        print(json.dumps(result, indent=2))
    else:
        _print(reports, others, ratios)
    return 0 if ok else 1


def _check(folder: Path) -> Report:
    checks, runner = run_checks(folder)
    report = Report(folder=folder, checks=checks, runner=runner)
    if runner is not None and not report.timeable:
        report.notes.append("latency is not measurable here: the packages ran in an interpreter")
    return report


def _matching(folders: list[Path], others: list[Path]) -> dict[Path, Path]:
    """Which other bundle each bundle is timed against: the one of the same backend and profile."""

    def kind(folder: Path) -> tuple[str, str]:
        manifest = Bundle.open(folder).manifest
        return manifest.backend, manifest.profile

    by_kind = {kind(other): other for other in others}
    pairs = {folder: by_kind[kind(folder)] for folder in folders if kind(folder) in by_kind}
    if not pairs:
        have = ", ".join(sorted({f"{backend} {profile}" for backend, profile in by_kind}))
        raise BundleError(f"--against has no bundle of the same backend and profile; it has {have}.")
    return pairs


def _measure(reports: dict[str, Report], *, rounds: int, threads: int, progress: Callable[[], None]) -> None:
    runners = {name: report.runner for name, report in reports.items()}
    for name, latency in measure_latency(runners, rounds=rounds, progress=progress).items():
        reports[name].latency = latency
    for report in reports.values():
        report.memory = measure_memory(report.runner.bundle, threads=threads)


def _ratio(other: Report, report: Report) -> dict[str, float] | None:
    """How many times faster `report` is, of a whole request."""
    if other.latency is None or report.latency is None:
        return None
    slow, fast = other.latency.request, report.latency.request
    return {"steady": slow.steady / fast.steady, "p50": slow.p50 / fast.p50, "min": slow.min / fast.min}


def _print(reports: list[Report], others: dict[Path, Report], ratios: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    colours = {"pass": "green", "fail": "red", "skip": "yellow"}
    for report in [*reports, *others.values()]:
        table = Table(title=f"{report.folder} ({report.profile})", title_justify="left")
        for column in ("check", "result", "found"):
            table.add_column(column)
        for check in report.checks:
            table.add_row(check.name, f"[{colours[check.status]}]{check.status}[/]", check.detail)
        if report.latency:
            for name, t in report.latency.parts.items():
                text = f"{t.steady:.3f} (p50 {t.p50:.3f}, p90 {t.p90:.3f}, min {t.min:.3f}, {t.calls} calls)"
                table.add_row("latency", "", f"{text} ms, {UNITS.get(name, name)}")
        if report.memory:
            text = f"peak {report.memory.peak:.0f} MB of the process, of which {report.memory.program:.1f} MB for the bundle"
            table.add_row("memory", "", text)
        for note in report.notes:
            table.add_row("note", "", note)
        console.print(table)
    for folder, ratio in ratios.items():
        if ratio:
            numbers = f"{ratio['steady']:.2f}x as fast (p50 {ratio['p50']:.2f}x, min {ratio['min']:.2f}x)"
            console.print(f"{folder}: {numbers} as {others[Path(folder)].folder}", soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())
