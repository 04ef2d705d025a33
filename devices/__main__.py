"""`python -m devices list | run`"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from devices.errors import DeviceError

EXAMPLE = """examples:
  python -m devices list
  python -m devices run model.pte --threads 1
  python -m devices run dense/model.pte pruned/model.pte --method prefill --json
"""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parse = argparse.ArgumentParser(
        prog="python -m devices",
        description="Devices that can be reached, and how fast programs run on them.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parse.add_subparsers(dest="command", required=True)
    listed = commands.add_parser("list", help="what can be reached", epilog=EXAMPLE.splitlines()[1])
    run = commands.add_parser("run", help="time the methods of ExecuTorch programs, interleaved")
    run.add_argument("programs", nargs="+", type=Path, metavar="PTE")
    run.add_argument("--device", default="host", help="where to run (default: host)")
    run.add_argument("--method", help="only this method")
    run.add_argument("--threads", type=int, default=1, metavar="N")
    run.add_argument("--rounds", type=int, default=20, metavar="N", help="turns of each method (default: 20)")
    for command in (listed, run):
        command.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    return parse


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the exit code: 0, or 2 for bad input."""
    args = parser().parse_args(argv)
    try:
        return _list(args) if args.command == "list" else _run(args)
    except DeviceError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _list(args: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.table import Table

    from devices.host import connect

    info = connect("host").info().to_json()
    if args.json:
        print(json.dumps({"devices": [info]}, indent=2))
        return 0
    table = Table("device", *list(info)[1:])
    table.add_row(info["name"], *("unknown" if value is None else str(value) for value in list(info.values())[1:]))
    Console().print(table)
    return 0


def _run(args: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.progress import track
    from rich.table import Table

    from devices.host import connect
    from devices.program import load_methods
    from devices.timing import interleave

    if args.rounds < 1 or args.threads < 1:
        raise DeviceError(f"--rounds {args.rounds} and --threads {args.threads} must be at least 1.")
    device = connect(args.device)
    runs = {}
    for path in args.programs:
        for name, method in load_methods(path, threads=args.threads, method=args.method).items():
            runs[f"{path}:{name}"] = method
    turns = iter(track(range(args.rounds), description="timing", console=Console(stderr=True), transient=True))
    next(turns)
    timings = interleave(runs, rounds=args.rounds, progress=lambda: next(turns, None))
    if args.json:
        result = {"device": device.info().to_json(), "threads": args.threads}
        print(json.dumps(result | {"ms": {name: timing.to_json() for name, timing in timings.items()}}, indent=2))
        return 0
    table = Table("method", "steady ms", "p50", "p90", "p99", "min", "calls", "rejected rounds")
    for name, t in timings.items():
        row = [f"{value:.3f}" for value in (t.steady, t.p50, t.p90, t.p99, t.min)]
        table.add_row(name, *row, str(t.calls), str(t.rejected))
    Console().print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
