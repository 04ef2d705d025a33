"""What `comp-edge bench ranking` and `comp-edge bench thresholds` share: options, the run, the report."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from comp_edge.cli import common


def add_options(parser: argparse.ArgumentParser, *, name: str, seeds: str, dense: str, quick: str, redo: str) -> None:
    """Everything but what a benchmark measures.

    Args:
        name: of the benchmark.
        seeds, dense, quick, redo: help texts.
    """
    parser.add_argument("-o", "--out", type=Path, help=f"folder to write to (default: bench-{name})")
    parser.add_argument("--seeds", nargs="+", type=common.natural, metavar="N", help=seeds)
    parser.add_argument("--dense", type=Path, metavar="FOLDER", help=dense)
    parser.add_argument("--options", metavar="NAME=VALUE,...", help="fields of comp_edge.PruneConfig")
    parser.add_argument(
        "--jobs", type=common.count, default=2, metavar="N", help="worker processes of one thread each (default: 2)"
    )
    parser.add_argument("--quick", action="store_true", help=quick)
    parser.add_argument("--redo", action="store_true", help=redo)
    parser.add_argument("--json", action="store_true", help="print results.json on stdout")


def run(
    arguments: Any,
    *,
    name: str,
    measure: Callable[[Any], list[Any]],
    write_report: Callable[..., dict[str, Any]],
) -> int:
    """Measure what is missing, and report; 1 when something went wrong.

    Args:
        measure: of the arguments; returns what went wrong.
        write_report: of the folder and the command; returns what results.json holds.
    """
    from comp_edge.bench.parts import PARTS, TABLE_FILE

    arguments.out = arguments.out or Path(f"bench-{name}-quick" if arguments.quick else f"bench-{name}")
    failures, command = [], None
    if not arguments.redo:
        command = shlex.join(["comp-edge", *sys.argv[1:]])
        failures = measure(arguments)
    for failure in failures:
        print(f"{failure.kind}: {failure.key}: {failure.reason}", file=sys.stderr)
    if failures and not any((arguments.out / PARTS).glob("*.json")):
        return 1
    results = write_report(arguments.out, command=command)
    if arguments.json:
        common.print_json(results)
    else:
        print((arguments.out / TABLE_FILE).read_text(encoding="utf-8"))
    return int(bool(failures))


def chosen_model(arguments: Any, quick: Sequence[str]) -> str:
    """The model that is asked for; for a quick run by default the first of these that is shipped.

    Raises:
        InputError: none is.
    """
    from comp_edge.checkpoint import CONFIG_FILE
    from comp_edge.errors import InputError
    from comp_edge.reference import asset_folder

    if arguments.model:
        return arguments.model
    if not arguments.quick:
        raise InputError("give a MODEL, such as blip-digits; only --quick and --redo do without one.")
    return next((name for name in quick if (asset_folder(name) / CONFIG_FILE).is_file()), quick[-1])


def chosen_config(arguments: Any, quick: str) -> Any:
    """`PruneConfig` with the options of a quick run, where it is one, and those that are given."""
    from comp_edge.options import with_options
    from comp_edge.settings import PruneConfig

    config = with_options(PruneConfig(), quick if arguments.quick else "", where="--quick")
    return with_options(config, arguments.options or "", where="--options")


def listed(values: Sequence[Any]) -> str:
    """Defaults, for a help text."""
    return " ".join(map(str, values))
