"""`comp-edge eval`: the score of a dense or pruned model on a task."""

from __future__ import annotations

from typing import Any

from comp_edge.cli import common

EXAMPLES = """\
examples:
  comp-edge eval llava-digits --task digit_vqa          the shipped model; reproduces its metrics.json
  comp-edge eval pruned --task digit_vqa --split val --json
  comp-edge eval pruned --task digit_vqa --deploy stock     as ExecuTorch's stock runner runs it
"""


def add(subparsers: Any) -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "eval", help="score a model", description="Score a dense or pruned model on a task.", epilog=EXAMPLES
    )
    parser.add_argument("model", help="a reference model, a folder (dense or pruned) or a hub id")
    parser.add_argument("--task", required=True, help="digit_vqa, easy_vqa or path/to/file.py:ClassName")
    parser.add_argument("--split", choices=("val", "test"), default="test")
    parser.add_argument(
        "--deploy",
        choices=("any", "stock"),
        default="any",
        help="stock: lift the token drops inside the language model, as a stock runtime does",
    )
    parser.add_argument("--torch-device", metavar="DEVICE", help=common.TORCH_DEVICE_HELP)
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    parser.set_defaults(run=run)


def run(arguments: Any) -> None:
    """Score and count."""
    from comp_edge.checkpoint import load_any, load_processor, resolve
    from comp_edge.cost import macs
    from comp_edge.families import family_of
    from comp_edge.placement import computing_device, placed
    from comp_edge.schedule import lift_language_drops
    from comp_edge.tasks import load_task, task_class

    resolve(arguments.model)
    task_class(arguments.task)
    device = computing_device(arguments.torch_device)
    model = load_any(arguments.model).to(device)
    if arguments.deploy == "stock":
        lift_language_drops(model)
    task = load_task(arguments.task, load_processor(arguments.model), model)
    prompt = family_of(model).request(model, task.example_inputs()).text_tokens
    batches = list(getattr(task, f"{arguments.split}_batches")())
    total = sum(len(next(iter(batch.values()))) for batch in batches)

    def counted(update: Any) -> Any:
        done = 0
        for batch in placed(batches, device):
            yield batch
            done += len(next(iter(batch.values())))
            update(done, total, "score")

    with common.progress_bar("score") as update:
        score = task.score(model, counted(update))
    result = {
        "model": arguments.model,
        "task": arguments.task,
        "split": arguments.split,
        "score": score,
        "examples": total,
        "deploy": arguments.deploy,
        "macs": macs(model, _running_plan(model), prompt_tokens=prompt),
        "parameters": sum(p.numel() for p in model.parameters()),
    }
    if arguments.json:
        common.print_json(result)
    else:
        print(
            f"{arguments.model}: {arguments.split} score {score:.4f} on {total:,} examples of {arguments.task}; "
            f"{result['macs']['total'] / 1e6:.1f} M MACs a request, {result['parameters'] / 1e6:.2f} M parameters"
        )


def _running_plan(model: Any) -> Any:
    """The model's plan with the token counts that it really runs on; None for a dense model."""
    from comp_edge.plan import plan_of
    from comp_edge.schedule import active_schedule

    plan, schedule = plan_of(model), active_schedule(model)
    return plan if plan is None else plan.with_tokens("language", schedule.tokens["language"])
