"""`comp-edge bench`: figures that anyone can rerun."""

from __future__ import annotations

import functools
from typing import Any

from comp_edge.cli import (
    bench_budget,
    bench_latency,
    bench_memory,
    bench_method,
    bench_ranking,
    bench_thresholds,
    common,
)

EXAMPLES = """\
examples:
  comp-edge bench speed                                    CLIP ViT-B/16 and SmolVLM-256M at 30 % of their MACs
  comp-edge bench speed llava-digits --keep 0.5 --rounds 20 --json
  comp-edge bench load random:smolvlm-256m                 a pruned folder against a dense model of its size
  comp-edge bench memory                                   the pruning pass against plain fine-tuning
  comp-edge bench latency --quick                          predicted milliseconds against measured ones
  comp-edge bench budget --quick                           are budgets in milliseconds met, and worth it?
  comp-edge bench method --quick                           the pruning strategies against each other
  comp-edge bench ranking --quick                          does an importance foresee what a removal costs?
  comp-edge bench thresholds --quick                       static token counts against per-image thresholds
"""
DEFAULT_MODELS = ("random:clip-vit-b-16", "random:smolvlm-256m")
LOAD_MODELS = ("random:smolvlm-256m",)


def add(subparsers: Any) -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "bench",
        help="measure what pruning gains",
        description="Measure what pruning gains: in latency, in loading, and in accuracy at equal steps.",
        epilog=EXAMPLES,
    )
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND", parser_class=common.Parser)
    speed = kinds.add_parser(
        "speed", help="forward latency in PyTorch eager, dense and pruned", description=SPEED, epilog=EXAMPLES
    )
    load = kinds.add_parser(
        "load", help="time and memory of loading a pruned folder", description=LOAD, epilog=EXAMPLES
    )
    for kind, rounds in ((speed, 7), (load, 5)):
        kind.add_argument("models", nargs="*", metavar="MODEL", help=common.MODEL_HELP)
        kind.add_argument(
            "--keep", type=common.fraction, default=0.3, help="fraction of the MACs to keep (default: 0.3)"
        )
        kind.add_argument("--rounds", type=common.count, default=rounds, help="counted rounds (default: %(default)s)")
        kind.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    speed.set_defaults(run=lambda arguments: _run(arguments, _speed, DEFAULT_MODELS))
    load.set_defaults(run=lambda arguments: _run(arguments, _load, LOAD_MODELS))
    for kind in (bench_budget, bench_latency, bench_memory, bench_method, bench_ranking, bench_thresholds):
        kind.add(kinds)


SPEED = """\
Prune by all modes in turn to a share of the MACs, and time whole forward passes (image and prompt) of the dense and the
pruned model in turns, one thread. `ideal` is the ratio of multiply-accumulates.
"""
LOAD = """\
Load a pruned folder with comp_edge.load_pretrained, and a dense model of the same architecture, depth and size with
transformers, each in a process of its own, in turns; every weight is touched.
"""


def _run(arguments: Any, measure: Any, models: tuple[str, ...]) -> None:
    from comp_edge.checkpoint import check_dense

    names = arguments.models or list(models)
    for name in names:
        check_dense(name)
    results = []
    for name in names:
        with common.progress_bar(name) as update:
            progress = functools.partial(_report, update, name)
            results.append({"model": name, **measure(arguments, name, progress)})
    if arguments.json:
        common.print_json({"keep": arguments.keep, "results": results})
    else:
        (_print_speed if measure is _speed else _print_load)(results)


def _report(update: Any, name: str, done: int, total: int) -> None:
    update(done, total, name)


def _speed(arguments: Any, name: str, progress: Any) -> dict[str, Any]:
    from comp_edge.bench.speed import measure
    from comp_edge.checkpoint import load_dense, load_processor
    from comp_edge.tasks import load_task

    model = load_dense(name)
    inputs = load_task("synthetic", load_processor(name), model).example_inputs()
    return measure(model, inputs, keep=arguments.keep, rounds=arguments.rounds, progress=progress)


def _load(arguments: Any, name: str, progress: Any) -> dict[str, Any]:
    from comp_edge.bench.loading import measure
    from comp_edge.checkpoint import load_dense

    return measure(load_dense(name), keep=arguments.keep, rounds=arguments.rounds, progress=progress)


def _print_speed(results: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="forward latency, PyTorch eager, one thread")
    for column in ("model", "MACs kept", "dense", "pruned", "speed-up", "ideal", "of ideal"):
        table.add_column(column, justify="left" if column == "model" else "right")
    for row in results:
        macs = row["macs"]
        table.add_row(
            row["model"], f"{macs['pruned'] / macs['dense']:.3f}", f"{row['dense_ms']:.1f} ms", f"{row['pruned_ms']:.1f} ms",
            f"{row['speedup']:.2f}x", f"{row['ideal']:.2f}x", f"{row['efficiency']:.2f}",
        )  # fmt: skip
    Console().print(table)


def _print_load(results: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="loading, every weight touched (ratios: pruned / dense, per byte of weights)")
    for column in ("model", "parameters", "dense", "pruned", "time", "memory"):
        table.add_column(column, justify="left" if column == "model" else "right")
    for row in results:
        sides = [
            f"{row[side]['cpu_seconds']:.2f} s, {row[side]['bytes'] / 2**20:.0f} MiB" for side in ("dense", "pruned")
        ]
        table.add_row(
            row["model"], f"{row['parameters'] / 1e6:.1f} M", *sides, f"{row['time_ratio']:.2f}x", f"{row['memory_ratio']:.2f}x"
        )  # fmt: skip
    Console().print(table)
