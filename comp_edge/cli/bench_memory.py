"""`comp-edge bench memory`: the pass against plain fine-tuning."""

from __future__ import annotations

from typing import Any

from comp_edge.cli import common

DESCRIPTION = """\
Peak memory of a whole pruning pass (a teacher, statistics, probes, validation, checkpoints) against plain fine-tuning with the
same optimizer and batch, each in a process of its own, in turns. Counted is what lies above the imports.
"""
EXAMPLES = """\
examples:
  comp-edge bench memory                                              llava-digits, 24 images a batch
  comp-edge bench memory llava-digits --strategy comp --batch 48
  comp-edge bench memory random:clip-vit-b-16 --task synthetic --batch 16 --steps 2 --rounds 1
"""


def add(kinds: Any) -> None:
    """Register the command among the kinds of `comp-edge bench`."""
    parser = kinds.add_parser(
        "memory", help="peak memory of the pass against plain fine-tuning", description=DESCRIPTION, epilog=EXAMPLES
    )
    parser.add_argument("model", nargs="?", default="llava-digits", metavar="MODEL", help=common.MODEL_HELP)
    parser.add_argument("--task", default="digit_vqa", help=common.TASK_HELP)
    parser.add_argument("--batch", type=common.count, default=24, help="images of a batch (default: %(default)s)")
    parser.add_argument("--strategy", default="probe", help="of the pass (default: %(default)s)")
    parser.add_argument("--keep", type=common.fraction, default=0.5, help="fraction of the MACs to keep (default: 0.5)")
    parser.add_argument("--steps", type=common.count, default=4, help="of a stage, and at the end (default: 4)")
    parser.add_argument("--accumulate", type=common.count, default=1, metavar="N", help="cut batches into N, both ways")
    parser.add_argument("--checkpointing", action="store_true", help="compute activations again, both ways")
    parser.add_argument("--rounds", type=common.count, default=3, help="counted rounds (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    parser.set_defaults(run=run)


def run(arguments: Any) -> None:
    """Measure, report."""
    from comp_edge.bench.memory import measure
    from comp_edge.checkpoint import resolve
    from comp_edge.errors import InputError
    from comp_edge.strategy import STRATEGIES
    from comp_edge.tasks import task_class

    if arguments.strategy not in STRATEGIES:
        raise InputError(f"unknown strategy {arguments.strategy!r}; give one of {', '.join(STRATEGIES)}.")
    resolve(arguments.model)
    task_class(arguments.task)
    with common.progress_bar(arguments.model) as update:
        result = measure(
            arguments.model,
            task=arguments.task,
            batch=arguments.batch,
            strategy=arguments.strategy,
            keep=arguments.keep,
            accumulate=arguments.accumulate,
            checkpointing=arguments.checkpointing,
            steps=arguments.steps,
            rounds=arguments.rounds,
            progress=lambda done, total: update(done, total, arguments.model),
        )
    if arguments.json:
        common.print_json(result)
        return
    plain, prune = (result[way]["bytes"] / 2**20 for way in ("plain", "prune"))
    print(
        f"{arguments.model}, {arguments.strategy}, {arguments.batch} images a batch: fine-tuning needs {plain:.0f} MiB, the "
        f"pass {prune:.0f} MiB, {result['ratio']:.2f}x"
    )
