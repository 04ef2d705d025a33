"""`comp-edge train`: a dense reference model from nothing, or a dense folder further."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

from comp_edge.cli import common

EXAMPLES = """\
examples:
  comp-edge train --task digit_vqa --model llava-digits -o my-llava
  comp-edge train --task digit_vqa --model llava-digits -o my-llava --resume     after an interruption
  comp-edge train --task digit_pairs --model clip-digits -o my-clip
  comp-edge train --task easy_vqa --model my-llava -o my-easy-llava --steps 1000
"""
STEPS, IMAGES = 3000, 24


def add(subparsers: Any) -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "train", help="train a dense model", description="Train a dense model on a task.", epilog=EXAMPLES
    )
    parser.add_argument("--task", required=True, help="digit_vqa, digit_pairs, easy_vqa or path/to/file.py:ClassName")
    parser.add_argument("--model", required=True, help="a reference model (from nothing), or a dense folder (further)")
    parser.add_argument("-o", "--out", type=Path, required=True, help="folder to write the model to")
    parser.add_argument(
        "--steps", type=common.count, help=f"optimizer steps (default: {STEPS}, or what a reference model takes)"
    )
    parser.add_argument(
        "--images",
        type=common.count,
        help=f"images per batch (default: {IMAGES} with questions; with captions, what the task says)",
    )
    parser.add_argument("--lr", type=common.positive, default=2e-3, help="AdamW's learning rate (default: %(default)s)")
    parser.add_argument("--matrix-lr", type=common.positive, default=3e-3, help="Muon's (default: %(default)s)")
    parser.add_argument("--torch-device", metavar="DEVICE", help=common.TORCH_DEVICE_HELP)
    parser.add_argument("--seed", type=common.natural, default=0)
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint of this run")
    parser.add_argument("--json", action="store_true", help="print the metrics as JSON on stdout")
    parser.set_defaults(run=run)


def run(arguments: Any) -> None:
    """Train, score, save."""
    from comp_edge.checkpoint import load_dense, load_processor
    from comp_edge.files import check_writable
    from comp_edge.placement import computing_device
    from comp_edge.reference import REFERENCE_MODELS
    from comp_edge.reference import STEPS as REFERENCE_STEPS
    from comp_edge.tasks import load_task, task_class
    from comp_edge.train import save_trained, size_batches, train

    check_writable(arguments.out)
    task_class(arguments.task)  # a wrong name should fail before a model is built
    device = computing_device(arguments.torch_device)
    if arguments.model in REFERENCE_MODELS:
        model, processor = REFERENCE_MODELS[arguments.model](arguments.seed)
    else:
        model, processor = load_dense(arguments.model), load_processor(arguments.model)
    model.to(device)
    task: Any = load_task(arguments.task, processor, model)
    size_batches(task, images=arguments.images or IMAGES, pairs=arguments.images)
    steps = arguments.steps or REFERENCE_STEPS.get(arguments.model, STEPS)
    work = arguments.out.with_name(arguments.out.name + ".work")
    started = time.time()
    scored = ""
    with common.progress_bar("train") as update:

        def on_score(step: int, score: float) -> None:
            nonlocal scored
            scored = f", val {score:.3f}"

        result = train(
            model,
            task,
            folder=work,
            steps=steps,
            lr=arguments.lr,
            matrix_lr=arguments.matrix_lr,
            seed=arguments.seed,
            resume=arguments.resume,
            on_step=lambda step, loss: update(step, steps, f"train, loss {loss:.3f}{scored}"),
            on_score=on_score,
        )
    seconds = time.time() - started
    metrics = save_trained(
        arguments.out,
        model,
        processor,
        task,
        task_name=arguments.task,
        steps=result.steps,
        seed=arguments.seed,
        seconds=seconds,
    )
    shutil.rmtree(work, ignore_errors=True)
    if arguments.json:
        common.print_json(metrics)
    else:
        print(f"{arguments.out}: test {metrics['test_score']:.4f}, validation {metrics['val_score']:.4f}")
