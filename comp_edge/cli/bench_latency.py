"""`comp-edge bench latency`: predicted against measured milliseconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from comp_edge.cli import common

DESCRIPTION = """\
Measure a profile of each model as python -m devices profile does, fit it, and predict pruned models that it has not seen; then
lower and measure these, too. Needs a machine that does nothing else. A run that was stopped goes on where it was when the same
command is given again. OUT gets results.json, the profiles, and latency.png.
"""
EXAMPLES = """\
examples:
  comp-edge bench latency --quick                              clip-digits, a few minutes
  comp-edge bench latency -o latency                           CLIP ViT-B/16 and the SmolVLM-256M shape, 24 plans each
  comp-edge bench latency llava-digits --plans 40 --device ssh://pi@board -o board
"""


def add(kinds: Any) -> None:
    """Register the command among the kinds of `comp-edge bench`."""
    parser = kinds.add_parser(
        "latency", help="predicted milliseconds against measured ones", description=DESCRIPTION, epilog=EXAMPLES
    )
    parser.add_argument("models", nargs="*", metavar="MODEL", help=common.MODEL_HELP)
    parser.add_argument(
        "-o", "--out", type=Path, help="folder to write to (default: bench-latency, or bench-latency-quick)"
    )
    parser.add_argument(
        "--device", default="host", help="host, ssh://[user@]host[:port] or adb://SERIAL (default: host)"
    )
    parser.add_argument("--plans", type=common.count, metavar="N", help="plans to predict, for each model")
    parser.add_argument("--threads", type=common.count, default=1, metavar="N", help="of the runtime (default: 1)")
    parser.add_argument(
        "--jobs", type=common.count, default=common.LOWERING_JOBS, metavar="N", help=common.LOWERING_HELP
    )
    parser.add_argument("--quick", action="store_true", help="one small model, few plans")
    parser.add_argument("--json", action="store_true", help="print results.json on stdout")
    parser.set_defaults(run=run)


def run(arguments: Any) -> None:
    """Measure, report."""
    from comp_edge.checkpoint import check_dense
    from comp_edge.files import check_writable
    from comp_edge.plugins import plugin

    for name in arguments.models:
        check_dense(name)
    out = arguments.out or Path("bench-latency-quick" if arguments.quick else "bench-latency")
    check_writable(out)
    with common.progress_bar("bench latency") as update:
        results = plugin("comp_edge.benches", "latency")(
            arguments.models,
            out=out,
            device=arguments.device,
            plans=arguments.plans,
            threads=arguments.threads,
            jobs=arguments.jobs,
            quick=arguments.quick,
            on_progress=update,
        )
    if arguments.json:
        common.print_json(results)
    else:
        _print(results)


def _print(results: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title="predicted milliseconds of pruned models that the profile has not seen")
    for column in ("model", "plans", "mean error", "within 10 %", "rank", "saved ms, median error", "profile"):
        table.add_column(column, justify="left" if column == "model" else "right")
    for name, row in results["models"].items():
        effort = f"{row['measurements']} measurements, {row['device_seconds']:.0f} s"
        if row["overhead"] is not None:
            effort += f", {row['overhead']:.0%} more than the raw measurements"
        table.add_row(name, *_figures(row), effort)
        table.add_row("  in proportion to MACs", *_figures(row["macs_proportional"]), "")
    console = Console(markup=False)  # names are of files
    console.print(table)
    for warning in results["warnings"]:
        console.print(Text.assemble(("warning", "yellow"), ": ", warning))


def _figures(row: dict[str, Any]) -> list[str]:
    whole, rank = row["whole_model"], row["whole_model"]["spearman"]
    return [
        str(whole["n"]), f"{whole['mape']:.1%}", f"{whole['within_10pct']:.0%}", "-" if rank is None else f"{rank:.3f}",
        f"{row['saved_ms']['median_error']:.1%}",
    ]  # fmt: skip
