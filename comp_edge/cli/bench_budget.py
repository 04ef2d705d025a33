"""`comp-edge bench budget`: budgets in milliseconds, and what steering by milliseconds is worth."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from comp_edge.cli import common

DESCRIPTION = """\
Profile a model on a device, prune it to ten budgets in milliseconds without training, and time every result once more; then
prune with training to the same measured milliseconds, steered by predicted milliseconds and by MACs, over three seeds. Needs a
machine that does nothing else. A run that was stopped goes on where it was when the same command is given again.
"""
EXAMPLES = """\
examples:
  comp-edge bench budget --quick                       two budgets, one pair of short passes
  comp-edge bench budget blip-digits -o budget         everything; about an hour on two cores
"""


def add(kinds: Any) -> None:
    """Register the command among the kinds of `comp-edge bench`."""
    parser = kinds.add_parser(
        "budget", help="are budgets in milliseconds met, and worth it?", description=DESCRIPTION, epilog=EXAMPLES
    )
    parser.add_argument("model", nargs="?", default="blip-digits", metavar="MODEL", help=common.MODEL_HELP)
    parser.add_argument("--task", default="digit_vqa", help=common.TASK_HELP)
    parser.add_argument(
        "-o", "--out", type=Path, help="folder to write to (default: bench-budget, or bench-budget-quick)"
    )
    parser.add_argument(
        "--device", default="host", help="host, ssh://[user@]host[:port] or adb://SERIAL (default: host)"
    )
    parser.add_argument("--train-steps", type=common.count, metavar="N", help="optimizer steps of passes that train")
    parser.add_argument("--decode-tokens", type=common.natural, default=0, metavar="N", help="after the first")
    parser.add_argument(
        "--jobs", type=common.count, default=common.LOWERING_JOBS, metavar="N", help=common.LOWERING_HELP
    )
    parser.add_argument("--quick", action="store_true", help="few budgets, few steps, one seed")
    parser.add_argument("--json", action="store_true", help="print results.json on stdout")
    parser.set_defaults(run=run)


def run(arguments: Any) -> None:
    """Measure, report."""
    from comp_edge.checkpoint import check_dense
    from comp_edge.files import check_writable
    from comp_edge.plugins import plugin
    from comp_edge.tasks import task_class

    check_dense(arguments.model)
    task_class(arguments.task)
    out = arguments.out or Path("bench-budget-quick" if arguments.quick else "bench-budget")
    check_writable(out)
    with common.progress_bar("bench budget") as update:
        results = plugin("comp_edge.benches", "budget")(
            arguments.model,
            task=arguments.task,
            out=out,
            device=arguments.device,
            steps=arguments.train_steps,
            decode_tokens=arguments.decode_tokens,
            quick=arguments.quick,
            jobs=arguments.jobs,
            on_progress=update,
        )
    if arguments.json:
        common.print_json(results)
        return
    budgets, steered = results["budgets"], results["steered"]
    print(
        f"{budgets['met']} of {budgets['n']} budgets met when the result is measured once more; at worst "
        f"{budgets['worst']:.3f} times the budget"
    )
    for pair in steered["pairs"]:
        print(f"seed {pair['seed']}, {pair['budget_ms']:.2f} ms: {pair['score']:+.4f} in score when milliseconds steer")
    if steered["score_error"] is not None:
        print(f"mean {steered['score']:+.4f}, standard error {steered['score_error']:.4f}")
    if steered["faster"] is not None:
        each = ", ".join(f"{value:+.1%}" for value in steered["faster_each"])
        print(
            f"at equal score, models that milliseconds steered are {steered['faster']:+.1%} faster in the mean of {each}"
        )
