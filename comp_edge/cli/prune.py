"""`comp-edge prune`: a dense model to a budget."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from comp_edge.cli import common

EXAMPLES = """\
examples:
  comp-edge prune --model llava-digits --task digit_vqa --keep 0.3 -o pruned
  comp-edge prune --model llava-digits --task digit_vqa --keep 0.3 --strategy comp -o pruned-comp
  comp-edge prune --model llava-digits --task digit_vqa --keep 0.3 -o pruned --resume    after an interruption
  comp-edge prune --model my-vlm --task tasks/my_task.py:MyTask --keep 0.5 --deploy stock -o pruned
"""


def add(subparsers: Any) -> None:
    """Register the command."""
    from comp_edge.strategy import STRATEGIES

    parser = subparsers.add_parser(
        "prune",
        help="prune a dense model to a budget",
        description="Prune parameters and tokens together until the model meets a budget (CoMP).",
        epilog=EXAMPLES,
    )
    parser.add_argument("--model", required=True, help="a reference model, a dense folder or a hub id")
    parser.add_argument("--task", required=True, help="digit_vqa, easy_vqa or path/to/file.py:ClassName")
    parser.add_argument("-o", "--out", type=Path, required=True, help="folder to write the pruned model to")
    parser.add_argument("--keep", type=common.fraction, default=0.3, help="fraction of the MACs to keep (default: 0.3)")
    parser.add_argument("--decode-tokens", type=common.natural, default=0, help="generated tokens to count in")
    parser.add_argument(
        "--strategy", default="probe", help=f"{' or '.join(STRATEGIES)} (default: %(default)s; comp is the paper's)"
    )
    parser.add_argument(
        "--deploy", choices=("any", "stock"), default="any",
        help="stock: drop tokens in the vision encoder only, for runtimes that prefill the image on its own",
    )  # fmt: skip
    parser.add_argument("--modes", nargs="+", help="let only these modes run (default: all of the model's)")
    parser.add_argument("--round-to", type=common.count, default=32, help="widths are multiples of this (default: 32)")
    parser.add_argument("--stages", type=common.count, help="stages on the way to the budget")
    parser.add_argument("--stage-steps", type=common.count, help="optimizer steps of a stage")
    parser.add_argument("--final-steps", type=common.natural, help="fine-tuning steps after the plan is frozen")
    parser.add_argument("--lr", type=common.positive, help="AdamW's peak learning rate")
    parser.add_argument("--matrix-lr", type=common.positive, help="Muon's peak learning rate")
    parser.add_argument("--seed", type=common.natural, default=0)
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint of this run")
    parser.add_argument("--json", action="store_true", help="print the metrics as JSON on stdout")
    parser.set_defaults(run=run)


def run(arguments: Any) -> None:
    """Prune, report."""
    from comp_edge.budget import Budget
    from comp_edge.checkpoint import is_pruned, load_dense, load_processor, resolve
    from comp_edge.errors import InputError
    from comp_edge.files import check_writable
    from comp_edge.pruning import prune
    from comp_edge.report import write_report
    from comp_edge.settings import PruneConfig
    from comp_edge.strategy import STRATEGIES
    from comp_edge.tasks import load_task, task_class

    if arguments.strategy not in STRATEGIES:
        raise InputError(f"unknown strategy {arguments.strategy!r}; give one of {', '.join(STRATEGIES)}.")
    resolve(arguments.model)
    if is_pruned(arguments.model):
        raise InputError(f"{arguments.model!r} is pruned already; give the dense model that it came from.")
    task_class(arguments.task)
    check_writable(arguments.out)
    options = {
        name: getattr(arguments, name)
        for name in ("stages", "stage_steps", "final_steps", "lr", "matrix_lr", "round_to")
        if getattr(arguments, name) is not None
    }
    if arguments.modes:
        options["modes"] = tuple(arguments.modes)
    model = load_dense(arguments.model)
    processor = load_processor(arguments.model)
    task = load_task(arguments.task, processor)
    with common.progress_bar("prune") as update:
        message = ""

        def on_progress(progress: Any) -> None:
            nonlocal message
            message = progress.message or message
            text = f"prune: {message}" if progress.phase == "prune" and message else progress.phase
            update(progress.done, progress.total, text)

        result = prune(
            model,
            task,
            budget=Budget(macs=arguments.keep, decode_tokens=arguments.decode_tokens),
            strategy=arguments.strategy,
            out=arguments.out,
            seed=arguments.seed,
            config=PruneConfig(**options),
            processor=processor,
            base=arguments.model,
            deploy=arguments.deploy,
            resume=arguments.resume,
            on_progress=on_progress,
        )
    write_report(arguments.out, task=arguments.task)
    metrics = result.metrics
    if arguments.json:
        common.print_json(metrics)
        return
    dense, pruned = metrics["dense"], metrics["pruned"]
    print(
        f"{arguments.out}: {metrics['macs_kept']:.1%} of the MACs, test score {pruned['test_score']:.4f} "
        f"(dense {dense.get('test_score', float('nan')):.4f}); look at {arguments.out / 'report.html'}"
    )
