"""`comp-edge bench thresholds`: a static token schedule against per-image thresholds at equal mean MACs."""

from __future__ import annotations

from typing import Any

from comp_edge.cli import bench_parts, common

DESCRIPTION = """\
Take the token schedule that the `tokens` strategy finds for a reduction, and train the dense model twice under it: with the
same number of tokens for every image, and with one threshold on importance a layer, which lets each image keep what reaches
it, as many on average. Both take the same optimizer steps on the same batches with the same objective. A run that was stopped
goes on with what is missing when the same command is given again. OUT gets results.json, table.md and parts/.
"""
EXAMPLES = """\
examples:
  comp-edge bench thresholds blip-digits --reductions 0.5 0.7 --seeds 0 1 2 --steps 300 -o thresholds
  comp-edge bench thresholds blip-digits -o thresholds --dense results/dense   each seed begins with its own dense model
  comp-edge bench thresholds --quick -o quick                                  a small run, in minutes
  comp-edge bench thresholds -o thresholds --redo                              the table anew, from the finished parts
"""
REDUCTIONS, SEEDS, STEPS = (0.5, 0.7), (0, 1, 2), 300
QUICK_MODELS, QUICK_REDUCTIONS, QUICK_SEEDS, QUICK_STEPS = ("blip-digits",), (0.4,), (0,), 6
QUICK_OPTIONS = "stages=3,stage_steps=2,val_examples=100,calibration_batches=1"
QUICK_IMAGES, QUICK_TEST = 64, 500


def add(kinds: Any) -> None:
    """Register the command among the kinds of `comp-edge bench`."""
    parser = kinds.add_parser(
        "thresholds",
        help="a static token schedule against per-image thresholds",
        description=DESCRIPTION,
        epilog=EXAMPLES,
    )
    parser.add_argument(
        "model", nargs="?", metavar="MODEL", help="a dense model that attends to images, or compares with them"
    )
    parser.add_argument(
        "--task", default="digit_vqa", help="digit_vqa, digit_pairs, easy_vqa or path/to/file.py:ClassName"
    )
    parser.add_argument(
        "--reductions", nargs="+", type=common.fraction, metavar="R",
        help=f"of the MACs (default: {bench_parts.listed(REDUCTIONS)})",
    )  # fmt: skip
    parser.add_argument(
        "--steps", type=common.count, metavar="N", help=f"optimizer steps of each side (default: {STEPS})"
    )
    bench_parts.add_options(
        parser,
        name="thresholds",
        seeds=f"(default: {bench_parts.listed(SEEDS)})",
        dense="each seed's dense model, as FOLDER/MODEL-SEED; by default all begin with MODEL",
        quick="one reduction, one seed, few steps",
        redo="run nothing: the table from what is finished",
    )
    parser.set_defaults(run=run)


def run(arguments: Any) -> int:
    """Run what is missing, and report; 1 when a comparison went wrong."""
    from comp_edge.bench.thresholds_report import write_report

    return bench_parts.run(arguments, name="thresholds", measure=_run, write_report=write_report)


def _run(arguments: Any) -> list[Any]:
    from comp_edge.bench.parts import dense_model
    from comp_edge.bench.thresholds_run import Comparison
    from comp_edge.bench.thresholds_run import run as run_comparisons
    from comp_edge.files import check_writable
    from comp_edge.tasks import task_class

    quick = arguments.quick
    model = bench_parts.chosen_model(arguments, QUICK_MODELS)
    task_class(arguments.task)
    check_writable(arguments.out)
    config = bench_parts.chosen_config(arguments, QUICK_OPTIONS)
    comparisons = [
        Comparison(
            out=arguments.out,
            model=model,
            dense=dense_model(model, seed, arguments.dense),
            task=arguments.task,
            reduction=reduction,
            seed=seed,
            steps=arguments.steps or (QUICK_STEPS if quick else STEPS),
            config=config,
            **({"images": QUICK_IMAGES, "test_examples": QUICK_TEST} if quick else {}),
        )
        for seed in dict.fromkeys(arguments.seeds or (QUICK_SEEDS if quick else SEEDS))
        for reduction in sorted(set(arguments.reductions or (QUICK_REDUCTIONS if quick else REDUCTIONS)))
    ]
    with common.progress_bar("bench thresholds") as update:
        return run_comparisons(comparisons, workers=arguments.jobs, on_progress=update)
