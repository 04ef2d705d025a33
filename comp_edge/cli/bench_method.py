"""`comp-edge bench method`: strategies against each other, over models, reductions and seeds."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Any

from comp_edge.cli import bench_parts, common

DESCRIPTION = """\
Prune models by several strategies to several reductions, from several dense models each, and compare the test scores.
Every cell (model, strategy, reduction, dense seed, pruning seed) takes the same number of optimizer steps, the final
fine-tuning included; what selecting cost is reported apart. A run that was stopped goes on where it was when the same
command is given again. OUT gets results.json, table.md, accuracy.png, modes.png and selection.png.

A strategy may carry options: STRATEGY[:NAME=VALUE,...], where NAME is a field of comp_edge.PruneConfig or of its MPS
constants, and VALUE is yes or no, a number, a name, several names joined by +, or none.
"""
EXAMPLES = """\
examples:
  comp-edge bench method --quick                                    a small run, in minutes
  comp-edge bench method llava-digits blip-digits -o results --jobs 2
  comp-edge bench method llava-digits@easy_vqa -o easy              on another task; the dense models are trained on it
  comp-edge bench method llava-digits -o ablation --strategies comp comp:cip=no comp:cip=no,cit=no comp:cost_aware=no
  comp-edge bench method llava-digits -o mps --strategies comp comp:history=0 comp:explore=0,horizon=10
  comp-edge bench method llava-digits -o base --strategies probe probe:importance=taylor probe:importance=wanda
  comp-edge bench method -o results --redo                          table and pictures anew, from the finished cells
"""
OURS = "probe"
REDUCTIONS, SEEDS = (0.5, 0.7, 0.8, 0.85), (0, 1, 2)
QUICK_MODELS, QUICK_REDUCTIONS, QUICK_SEEDS = ("blip-digits", "llava-digits"), (0.5, 0.7), (0,)
QUICK_STEPS, QUICK_TEST = 40, 1500
QUICK_OPTIONS = "stages=5,stage_steps=4,val_examples=100,calibration_batches=1"


def add(kinds: Any) -> None:
    """Register the command among the kinds of `comp-edge bench`."""
    parser = kinds.add_parser(
        "method", help="accuracy of the strategies at equal steps", description=DESCRIPTION, epilog=EXAMPLES
    )
    parser.add_argument(
        "models",
        nargs="*",
        metavar="MODEL[@TASK]",
        help="reference models, or what --dense holds (default: all of them)",
    )
    parser.add_argument(
        "-o", "--out", type=Path, help="folder to write to (default: bench-method, or bench-method-quick)"
    )
    parser.add_argument(
        "--strategies", nargs="+", metavar="STRATEGY", help="strategies, with or without options (default: all of them)"
    )
    parser.add_argument(
        "--ours", metavar="STRATEGY", help=f"the strategy that is compared with every other one (default: {OURS})"
    )
    parser.add_argument(
        "--reductions", nargs="+", type=common.fraction, help=f"of the MACs (default: {bench_parts.listed(REDUCTIONS)})"
    )
    parser.add_argument(
        "--dense-seeds", nargs="+", type=common.natural, metavar="N",
        help=f"seeds of dense models; 0 is the shipped one, others are trained (default: {bench_parts.listed(SEEDS)})",
    )  # fmt: skip
    parser.add_argument(
        "--prune-seeds", nargs="+", type=common.natural, metavar="N", help="one for each dense seed (default: the same)"
    )
    parser.add_argument("--cross", action="store_true", help="every dense seed with every pruning seed")
    parser.add_argument("--steps", type=common.count, metavar="N", help="optimizer steps of every cell (default: 300)")
    parser.add_argument(
        "--options", metavar="NAME=VALUE,...", help="options of all strategies; a strategy's own go before"
    )
    parser.add_argument(
        "--dense", type=Path, metavar="FOLDER", help="dense models that are there already, as FOLDER/MODEL-SEED"
    )
    parser.add_argument(
        "--dense-steps",
        type=common.count,
        metavar="N",
        help="steps of dense training (default: as the shipped model's)",
    )
    parser.add_argument(
        "--test-examples", type=common.count, metavar="N", help="score on the first N test examples (default: on all)"
    )
    parser.add_argument(
        "--jobs", type=common.count, default=2, metavar="N", help="worker processes of one thread each (default: 2)"
    )
    parser.add_argument("--quick", action="store_true", help="one model, two reductions, one seed, few steps")
    parser.add_argument("--redo", action="store_true", help="run nothing: table and pictures from what is finished")
    parser.add_argument("--json", action="store_true", help="print results.json on stdout")
    parser.set_defaults(run=run)


def run(arguments: Any) -> int:
    """Run what is missing, and report; 1 when a cell failed otherwise than by being refused."""
    from comp_edge.bench.method.results import TABLE_FILE, load_cells, write_pictures, write_results
    from comp_edge.bench.method.statistics import unique
    from comp_edge.errors import InputError

    failures: list[dict[str, Any]] = []
    arguments.out = arguments.out or Path("bench-method-quick" if arguments.quick else "bench-method")
    if arguments.redo:
        labels = unique(load_cells(arguments.out), "strategy")
        if not labels:
            raise InputError(f"{str(arguments.out)!r} holds no finished cells; run the command without --redo first.")
        _check_ours(arguments.ours, labels)
    else:
        try:
            failures = _run(arguments)
        except KeyboardInterrupt:
            print("\ncomp-edge bench: interrupted; give the same command again to go on.", file=sys.stderr)
            return common.INTERRUPTED
    ours = arguments.ours or OURS
    results = write_results(arguments.out, ours=ours)
    write_pictures(arguments.out, ours=ours)
    if arguments.json:
        common.print_json(results)
    else:
        print((arguments.out / TABLE_FILE).read_text(encoding="utf-8"))
    for failure in failures:
        print(
            f"{failure['kind']}: {failure['model']} {failure['strategy']} {failure['reduction']} seeds "
            f"{failure['dense_seed']}/{failure['prune_seed']}: {failure['reason']}",
            file=sys.stderr,
        )
    return int(any(failure["kind"] == "failed" for failure in failures))


def _run(arguments: Any) -> list[dict[str, Any]]:
    from comp_edge.bench.method.grid import grid, seed_pairs
    from comp_edge.bench.method.results import load_cells
    from comp_edge.bench.method.run import run as run_cells
    from comp_edge.bench.method.statistics import unique
    from comp_edge.files import check_writable

    targets, methods = _targets(arguments), _methods(arguments)
    labels = [method.label for method in methods]
    check_writable(arguments.out)
    labels += [label for label in unique(load_cells(arguments.out), "strategy") if label not in labels]
    _check_ours(arguments.ours, labels)
    quick = arguments.quick
    pairs = seed_pairs(
        arguments.dense_seeds or (QUICK_SEEDS if quick else SEEDS), arguments.prune_seeds, cross=arguments.cross
    )
    reductions = sorted(set(arguments.reductions or (QUICK_REDUCTIONS if quick else REDUCTIONS)))
    test = arguments.test_examples or (QUICK_TEST if quick else None)
    cells = grid(targets, methods, reductions, pairs, test_examples=test)
    with common.progress_bar("bench method") as update:
        return run_cells(
            cells,
            out=arguments.out,
            ours=arguments.ours or OURS,
            command=shlex.join(["comp-edge", *sys.argv[1:]]),
            workers=arguments.jobs,
            dense=arguments.dense,
            recipe=lambda target: _recipe(target, arguments.dense_steps),
            on_progress=update,
        )


def _check_ours(ours: str | None, labels: list[str]) -> None:
    from comp_edge.errors import InputError

    if ours not in (None, *labels):
        raise InputError(f"--ours {ours!r} is not among the strategies: {', '.join(labels)}.")


def _targets(arguments: Any) -> list[Any]:
    from comp_edge.bench.method.grid import default_models, parse_target
    from comp_edge.errors import InputError

    if arguments.dense is not None and not arguments.dense.is_dir():
        raise InputError(f"--dense {str(arguments.dense)!r} is no folder; give one with folders MODEL-SEED.")
    known = default_models()
    names = arguments.models or ([next(m for m in QUICK_MODELS if m in known)] if arguments.quick else known)
    return list(dict.fromkeys(parse_target(name, dense=arguments.dense) for name in names))


def _methods(arguments: Any) -> list[Any]:
    from comp_edge import strategy
    from comp_edge.bench.method.grid import STEPS
    from comp_edge.options import parse_method, with_options
    from comp_edge.settings import PruneConfig

    base = PruneConfig().sharing(arguments.steps or (QUICK_STEPS if arguments.quick else STEPS))
    if arguments.quick:
        base = with_options(base, QUICK_OPTIONS, where="--quick")
    base = with_options(base, arguments.options or "", where="--options")
    labels = dict.fromkeys(arguments.strategies or strategy.STRATEGIES)
    return [parse_method(label, base=base) for label in labels]


def _recipe(target: Any, steps: int | None) -> Any:
    """How `comp-edge train` trains it: as the shipped model's metrics say that it was, else by its defaults."""
    from comp_edge.bench.method.dense import METRICS_FILE, Recipe
    from comp_edge.cli import train
    from comp_edge.files import read_json
    from comp_edge.reference import STEPS, asset_folder

    parser = common.Parser()
    train.add(parser.add_subparsers())
    words = ["comp-edge", "train", "--task", target.task, "--model", target.model, "-o", ""]
    metrics = asset_folder(target.model) / METRICS_FILE
    if metrics.is_file():
        shipped = shlex.split(read_json(metrics, what="metrics").get("command", ""))
        if shipped[:2] == words[:2] and {target.task, target.model} <= set(shipped):
            words = shipped
    known, _ = parser.parse_known_args(words[1:])
    steps = steps or known.steps or STEPS.get(target.model, train.STEPS)
    images = known.images or train.IMAGES
    return Recipe(steps=steps, images=images, pairs=known.images, lr=known.lr, matrix_lr=known.matrix_lr)
