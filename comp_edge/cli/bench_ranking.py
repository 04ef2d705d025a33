"""`comp-edge bench ranking`: which importance foresees what a removal costs."""

from __future__ import annotations

import argparse
from typing import Any

from comp_edge.cli import bench_parts, common

DESCRIPTION = """\
Spearman correlation between each importance and what the loss on training data really does when one unit or one token is
removed alone: in the dense model, and in what `comp` makes of it on the way to the last reduction. Importances of units are
structured Wanda with and without CIP, first-order Taylor, Fisher and the magnitude of the weights; those of tokens are the
base with and without CIT. A run that was stopped goes on where it was when the same command is given again. OUT gets
results.json, table.md, ranking.png and parts/.
"""
EXAMPLES = """\
examples:
  comp-edge bench ranking blip-digits -o ranking
  comp-edge bench ranking llava-digits -o ranking-llava --reductions 0 0.5 --seeds 0
  comp-edge bench ranking blip-digits -o ranking --dense results/dense      each seed prunes a dense model of its own
  comp-edge bench ranking --quick -o quick                                  a small run, in minutes
  comp-edge bench ranking -o ranking --redo                                 table and picture anew, from the finished parts
"""
REDUCTIONS, SEEDS = (0.0, 0.3, 0.5, 0.7), (0, 1, 2)
QUICK_MODELS, QUICK_REDUCTIONS, QUICK_SEEDS = ("blip-digits", "llava-digits"), (0.0, 0.4), (0,)
QUICK_OPTIONS = "stages=4,stage_steps=2,val_examples=100,calibration_batches=1"
QUICK_EXTENT = {"questions": 96, "groups": 3, "channels": 3, "image_questions": 48, "tokens": 4}


def add(kinds: Any) -> None:
    """Register the command among the kinds of `comp-edge bench`."""
    parser = kinds.add_parser(
        "ranking", help="how well importances foresee the change of the loss", description=DESCRIPTION, epilog=EXAMPLES
    )
    parser.add_argument("model", nargs="?", metavar="MODEL", help="a dense model of questions about images")
    parser.add_argument("--task", default="digit_vqa", help="digit_vqa, easy_vqa or path/to/file.py:ClassName")
    parser.add_argument(
        "--reductions", nargs="+", type=_reduction, metavar="R",
        help=f"of the MACs; 0 is the dense model (default: {' '.join(f'{r:g}' for r in REDUCTIONS)})",
    )  # fmt: skip
    bench_parts.add_options(
        parser,
        name="ranking",
        seeds=f"of the pruning (default: {bench_parts.listed(SEEDS)})",
        dense="each seed's dense model, as FOLDER/MODEL-SEED; by default all prune MODEL",
        quick="two reductions, one seed, few steps and removals",
        redo="measure nothing: table and picture from what is finished",
    )
    parser.set_defaults(run=run)


def run(arguments: Any) -> int:
    """Measure what is missing, and report; 1 when a seed went wrong."""

    def write_report(*given: Any, **options: Any) -> dict[str, Any]:
        from comp_edge.bench import ranking_report  # brings matplotlib

        return ranking_report.write_report(*given, **options)

    return bench_parts.run(arguments, name="ranking", measure=_run, write_report=write_report)


def _run(arguments: Any) -> list[Any]:
    from comp_edge.bench.parts import dense_model
    from comp_edge.bench.ranking import Course, Extent
    from comp_edge.bench.ranking import run as run_courses
    from comp_edge.errors import InputError
    from comp_edge.files import check_writable
    from comp_edge.tasks import task_class

    quick = arguments.quick
    model = bench_parts.chosen_model(arguments, QUICK_MODELS)
    reductions = tuple(sorted(set(arguments.reductions or (QUICK_REDUCTIONS if quick else REDUCTIONS))))
    if reductions[-1] == 0:
        raise InputError("--reductions 0 asks for the dense model alone; give at least one above 0, to prune to.")
    task_class(arguments.task)
    check_writable(arguments.out)
    config = bench_parts.chosen_config(arguments, QUICK_OPTIONS)
    courses = [
        Course(
            out=arguments.out,
            model=model,
            dense=dense_model(model, seed, arguments.dense),
            task=arguments.task,
            seed=seed,
            reductions=reductions,
            config=config,
            extent=Extent(**QUICK_EXTENT) if quick else Extent(),
        )
        for seed in dict.fromkeys(arguments.seeds or (QUICK_SEEDS if quick else SEEDS))
    ]
    with common.progress_bar("bench ranking") as update:
        return run_courses(courses, workers=arguments.jobs, on_progress=update)


def _reduction(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 0 and below 1")
    return value
