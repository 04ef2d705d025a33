"""`comp-edge prune`: a dense model to a budget."""

from __future__ import annotations

import os
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

from comp_edge.cli import common

KEEP = 0.3  # of the MACs, where no budget is given
EXAMPLES = """\
examples:
  comp-edge prune --model llava-digits --task digit_vqa --keep 0.3 -o pruned
  comp-edge prune --model llava-digits --task digit_vqa --keep 0.3 --strategy comp -o pruned-comp
  comp-edge prune --model llava-digits --task digit_vqa --keep 0.3 --strategy comp:cip=no,explore=0 -o ablated
  comp-edge prune --model llava-digits --task digit_vqa --keep 0.3 -o pruned --resume    after an interruption
  comp-edge prune --model HuggingFaceTB/SmolVLM-256M-Instruct --task tasks/my_task.py:MyTask --keep 0.5 -o pruned
  comp-edge prune --model llava-digits --task digit_vqa --device pixel.json --latency-ms 12 --decode-tokens 4 -o fast
                                                      to milliseconds on the device that the profile was measured on
  comp-edge prune --model pruned --task digit_vqa --keep 0.8 -o pruned-more       80 % of what is left
  comp-edge prune --model my-vlm --task tasks/my_task.py:MyTask --train-steps 0 --strategy comp --dtype bfloat16 -o out
                                                      without training: importance from calibration batches only
  comp-edge prune --model random:smolvlm-256m --task synthetic --train-steps 40 -o out     time and memory at true size
  comp-edge prune --model my-vlm --task tasks/my_task.py:MyTask --accumulate 4 --checkpointing -o out     less memory
  accelerate launch --multi_gpu --num_processes 2 -m comp_edge prune --model ... --task ... -o out
                                                      each process trains on its half of every batch
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
    parser.add_argument("--model", required=True, help=common.MODEL_HELP)
    parser.add_argument("--task", required=True, help=common.TASK_HELP)
    parser.add_argument(
        "--dtype", choices=common.DTYPES, default="float32", help="of the weights while pruning (default: float32)"
    )
    parser.add_argument("--torch-device", metavar="DEVICE", help=common.TORCH_DEVICE_HELP)
    parser.add_argument("-o", "--out", type=Path, required=True, help="folder to write the pruned model to")
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument("--keep", type=common.fraction, help=f"fraction of the MACs to keep (default: {KEEP})")
    budget.add_argument(
        "--latency-ms",
        type=common.positive,
        metavar="MS",
        help="milliseconds of a request on the device; needs --device",
    )
    budget.add_argument(
        "--speedup", type=common.above_one, metavar="X", help="times faster: on the device, or in MACs without --device"
    )
    parser.add_argument(
        "--device", metavar="PROFILE", help="what python -m devices profile measured: milliseconds on that device steer"
    )
    parser.add_argument(
        "--no-measure", action="store_true", help="trust predictions, also where the profile's device is attached"
    )
    parser.add_argument(
        "--decode-tokens", type=common.natural, default=0, help="generated tokens to count in, after the first"
    )
    parser.add_argument(
        "--strategy",
        default="probe",
        metavar="STRATEGY[:NAME=VALUE,...]",
        help=f"{' or '.join(STRATEGIES)} (default: %(default)s; comp is the paper's), and options of comp_edge.PruneConfig",
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
    parser.add_argument(
        "--train-steps",
        type=common.natural,
        metavar="N",
        help="optimizer steps in all, instead of the two options above: a sixth in stages, the others after; 0 trains nothing",
    )
    parser.add_argument(
        "--accumulate", type=common.count, metavar="N", help="cut training batches into N, for less memory (default: 1)"
    )
    parser.add_argument(
        "--checkpointing", action="store_true", help="compute activations again for gradients, for less memory"
    )
    parser.add_argument("--val-examples", type=common.count, help="validation examples that score a stage")
    parser.add_argument("--no-eval", action="store_true", help="do not score on the test split at the end")
    parser.add_argument(
        "--lr", type=common.positive, help="AdamW's peak learning rate (default: 2e-3; 5e-4 without Muon)"
    )
    parser.add_argument("--matrix-lr", type=common.positive, help="Muon's peak learning rate (default: 3e-3)")
    parser.add_argument("--seed", type=common.natural, default=0)
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint of this run")
    parser.add_argument("--json", action="store_true", help="print the metrics as JSON on stdout")
    parser.set_defaults(run=run)


def run(arguments: Any) -> int:
    """Prune, report. Of several processes (see `comp_edge.parallel`) the main one speaks for all."""
    from comp_edge.parallel import speaks

    if speaks():
        _prune(arguments, main=True)
        return 0
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        return common.run(lambda: _prune(arguments, main=False), name="")


def _prune(arguments: Any, *, main: bool) -> None:
    from comp_edge.checkpoint import load_any, load_processor, resolve
    from comp_edge.errors import InputError
    from comp_edge.files import check_writable
    from comp_edge.options import parse_method
    from comp_edge.placement import computing_device
    from comp_edge.pruning import prune
    from comp_edge.settings import PruneConfig
    from comp_edge.tasks import load_task, task_class

    options = {
        name: getattr(arguments, name)
        for name in (
            "stages",
            "stage_steps",
            "final_steps",
            "lr",
            "matrix_lr",
            "round_to",
            "val_examples",
            "accumulate",
        )
        if getattr(arguments, name) is not None
    }
    if arguments.train_steps is not None and options.keys() & {"stage_steps", "final_steps"}:
        raise InputError(
            "--train-steps says how many steps there are in all; leave out --stage-steps and --final-steps."
        )
    if arguments.modes:
        options["modes"] = tuple(arguments.modes)
    config = PruneConfig(checkpointing=arguments.checkpointing, **options)
    if arguments.train_steps is not None:
        config = config.sharing(arguments.train_steps)
    method = parse_method(arguments.strategy, base=config)
    if arguments.device is None and arguments.latency_ms is not None:
        raise InputError(f"--latency-ms {arguments.latency_ms:g} needs --device with a profile of the device.")
    if arguments.device is not None and arguments.latency_ms is None and arguments.speedup is None:
        raise InputError(f"--device {arguments.device!r} needs --latency-ms or --speedup.")
    resolve(arguments.model)
    task_class(arguments.task)
    check_writable(arguments.out)
    device = computing_device(arguments.torch_device)
    model = load_any(arguments.model, dtype=common.dtype(arguments.dtype)).to(device)
    processor = load_processor(arguments.model)
    task = load_task(arguments.task, processor, model)
    with common.progress_bar("prune") as update:
        message = ""

        def on_progress(progress: Any) -> None:
            nonlocal message
            message = progress.message or message
            text = f"prune: {message}" if progress.phase in ("prune", "scout") and message else progress.phase
            update(progress.done, progress.total, text)

        result = prune(
            model,
            task,
            budget=_budget(arguments, model),
            strategy=method.strategy,
            out=arguments.out,
            seed=arguments.seed,
            config=method.config,
            processor=processor,
            base=arguments.model,
            deploy=arguments.deploy,
            resume=arguments.resume,
            evaluate=not arguments.no_eval,
            on_progress=on_progress,
        )
    if not main:
        return
    from comp_edge.report import write_report  # brings matplotlib, whose memory a large model may need

    write_report(arguments.out, task=arguments.task)
    metrics = result.metrics
    if arguments.json:
        common.print_json(metrics | {"trace": result.trace})
        return
    _print_stages(result.trace)
    dense, pruned = metrics["dense"], metrics["pruned"]
    split = "val" if arguments.no_eval else "test"
    print(
        f"{arguments.out}: {metrics['macs_kept']:.1%} of the MACs, {split} score {pruned[f'{split}_score']:.4f} "
        f"(before {dense[f'{split}_score']:.4f}), {_latency(metrics)}{sum(metrics['seconds'].values()):.0f} s, at most "
        f"{metrics['peak_memory_bytes'] / 2**30:.2f} GiB; look at {arguments.out / 'report.html'}"
    )


def _latency(metrics: dict[str, Any]) -> str:
    """What the device says of the plan, where one was asked."""
    if "device" not in metrics:
        return ""
    predicted = metrics["device"]["predicted_ms"]
    if not metrics["measured"]:
        return f"{predicted['pruned']:.2f} ms predicted (before {predicted['dense']:.2f}), not measured, "
    last = metrics["measured"][-1]
    return f"{last['measured']:.2f} ms measured ({last['predicted']:.2f} predicted, before {predicted['dense']:.2f}), "


def _budget(arguments: Any, model: Any) -> Any:
    from comp_edge.budget import Budget
    from comp_edge.plugins import plugin

    given = {name: getattr(arguments, name) for name in ("latency_ms", "speedup")}
    if arguments.device is not None:
        attached = not arguments.no_measure
        options = {"model": model, "decode_tokens": arguments.decode_tokens, "attached": attached}
        cost = plugin("comp_edge.costs", "device")(arguments.device, **options)
        return Budget(cost=cost, decode_tokens=arguments.decode_tokens, **given)
    keep = arguments.keep or (KEEP if arguments.speedup is None else None)
    return Budget(macs=keep, speedup=arguments.speedup, decode_tokens=arguments.decode_tokens)


def _print_stages(trace: list[dict[str, Any]]) -> None:
    """What each stage did, how long it took and how much memory it needed, on stderr."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="stages")
    for name in ("stage", "mode", "MACs kept", "score", "seconds", "peak memory"):
        table.add_column(name, justify="left" if name == "mode" else "right")
    for stage in trace:
        table.add_row(
            str(stage["stage"]), stage["mode"], f"{stage['cost_fraction']:.3f}", f"{stage['score']:.3f}",
            f"{stage['seconds']:.1f}", f"{stage['peak_memory_bytes'] / 2**30:.2f} GiB",
        )  # fmt: skip
    Console(stderr=True).print(table)
