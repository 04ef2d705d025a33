"""Training a dense model from nothing (or further), with checkpoints to resume from."""

from __future__ import annotations

import itertools
import math
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from comp_edge.families import family_of
from comp_edge.files import whole_folder, write_json
from comp_edge.optim import Optimizer, load_state, save_state, warmup_cosine, with_prefix
from comp_edge.placement import CPU, device_of, placed
from comp_edge.tasks import Task, take_examples
from comp_edge.tasks.folding import distinct_images
from comp_edge.tasks.packing import PIXELS, take_rows

CHUNK = 250  # steps between checkpoints; the data order is seeded by chunk, so a resumed run sees the same batches
CHECKPOINT, METRICS_FILE = "train.safetensors", "metrics.json"


@dataclass(frozen=True)
class TrainResult:
    """What a training run reports: validation score, its steps, and the mean loss of the last chunk."""

    val_score: float
    steps: int
    loss: float


def train(
    model: Any,
    task: Task,
    *,
    folder: str | Path,
    steps: int = 3000,
    lr: float = 2e-3,
    matrix_lr: float = 3e-3,
    seed: int = 0,
    auxiliary: float = 1.0,
    val_questions: int = 1000,
    resume: bool = False,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
    on_score: Callable[[int, float], None] = lambda step, score: None,
) -> TrainResult:
    """Train `model` in place.

    Args:
        folder: where the checkpoint is kept until the run is complete.
        lr, matrix_lr: peak learning rates of AdamW and Muon.
        auxiliary: weight of the task's auxiliary per-patch loss, where the task has one (`auxiliary_head`).
        val_questions: how many validation examples each intermediate score uses.

    Raises:
        FloatingPointError: the loss is not finite; the last checkpoint is intact.
    """
    torch.manual_seed(seed)
    checkpoint = Path(folder) / CHECKPOINT
    head = _auxiliary_head(model, task) if auxiliary else None
    named = list(model.named_parameters()) + ([] if head is None else list(head.named_parameters("auxiliary")))
    optimizer = Optimizer(named, matrix_lr=matrix_lr, lr=lr)
    done = 0
    if resume:
        tensors, progress = load_state(checkpoint)
        done = progress["steps"]
        _restore(tensors, model, head, optimizer)
    device = device_of(model)
    validation = list(take_examples(task.val_batches(), val_questions))
    mean, score = math.nan, math.nan
    while done < steps:
        model.train()
        count = min(CHUNK, steps - done)
        total = 0.0
        drawn = itertools.islice(task.train_batches(seed * 100_003 + done // CHUNK), count)
        for batch in placed(drawn, device):
            with _tower_outputs(model) if head is not None else nullcontext([]) as seen:
                loss = task.loss(model, batch)
            objective = loss
            if head is not None:
                first, _ = distinct_images(batch["image_ids"])
                # Tasks encode an image once for all that is asked about it; what they computed need not be computed again.
                shared = len(seen) == 1 and len(seen[0]) == len(first)
                features = _patches(seen[0]) if shared else _patch_features(model, take_rows(batch, first))
                labels = task.patch_labels(batch["image_ids"][first].to(CPU)).to(device)
                # Decays to nothing: it shows the tower what to see, then leaves it to the questions.
                objective = loss + auxiliary * max(0.0, 1 - 1.25 * done / steps) * head(features, labels)
            optimizer.step(objective, factor=warmup_cosine(done, steps))
            total += float(loss.detach())
            done += 1
            on_step(done, float(loss.detach()))
        mean = total / count
        model.eval()
        score = task.score(model, placed(validation, device))
        on_score(done, score)
        tensors = {f"model.{k}": v for k, v in model.state_dict().items()}
        tensors |= {f"optimizer.{k}": v for k, v in optimizer.state_tensors().items()}
        if head is not None:
            tensors |= {f"head.{k}": v for k, v in head.state_dict().items()}
        save_state(checkpoint, tensors, {"steps": done})
    model.eval()
    if math.isnan(score):
        score = task.score(model, placed(validation, device))
    return TrainResult(val_score=score, steps=done, loss=mean)


def size_batches(task: Any, *, images: int, pairs: int | None) -> None:
    """Set how much a training batch of a built-in kind of task holds.

    Args:
        images: with several questions an image.
        pairs: of image and text; None leaves it to the task.
    """
    if hasattr(task, "images_per_batch"):
        task.images_per_batch = images
    elif pairs is not None and hasattr(task, "pairs_per_batch"):
        task.pairs_per_batch = pairs


def save_trained(
    folder: Path,
    model: Any,
    processor: Any,
    task: Any,
    *,
    task_name: str,
    steps: int,
    seed: int,
    seconds: float,
    recipe: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Score a trained model, and write its folder with metrics.json; returns what that holds.

    Args:
        recipe: what else to record of the training.

    Raises:
        InputError: the folder cannot be written to.
    """
    device = device_of(model)
    metrics = {
        "task": task_name,
        "test_score": task.score(model, placed(task.test_batches(), device)),
        "val_score": task.score(model, placed(task.val_batches(), device)),
        **(recipe or {}),
        "steps": steps,
        "seed": seed,
        "seconds": round(seconds, 1),
        "parameters": sum(p.numel() for p in model.parameters()),
        "command": shlex.join(["comp-edge", *sys.argv[1:]]),
    }
    with whole_folder(folder) as staging:
        model.save_pretrained(staging)
        processor.save_pretrained(staging)
        write_json(staging / METRICS_FILE, metrics)
    return metrics


@torch.no_grad()
def _auxiliary_head(model: Any, task: Task) -> nn.Module | None:
    """The task's per-patch classifier, where it has one and the model sees an image as one square grid of patches."""
    make = getattr(task, "auxiliary_head", None)
    vision = family_of(model).streams(model)["vision"]
    if make is None or vision.packed:
        return None
    example = next(iter(placed(task.val_batches(), device_of(model))))
    if _pictures(example) is None:
        return None
    features = _patch_features(model, take_rows(example, slice(0, 1)))
    return make(features.shape[-1], features.shape[1]).to(features.device)


def _pictures(batch: dict[str, Tensor]) -> Tensor | None:
    """Images [n, 3, H, W] of a batch; None where they are patches or more than one tile each."""
    pixels = batch[PIXELS]
    if pixels.ndim == 5 and pixels.shape[1] == 1:
        pixels = pixels[:, 0]
    return pixels if pixels.ndim == 4 else None


def _patch_features(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Patch tokens [n, patches, width] that the vision stream ends with, CLS left out."""
    tower = family_of(model).streams(model)["vision"].root
    return _patches(tower(pixel_values=_pictures(batch)).last_hidden_state)


def _patches(hidden: Tensor) -> Tensor:
    """The square grid of patches at the end of a vision stream's tokens [n, tokens, width]."""
    return hidden[:, hidden.shape[1] - math.isqrt(hidden.shape[1]) ** 2 :]


@contextmanager
def _tower_outputs(model: Any) -> Iterator[list[Tensor]]:
    """While active, what the vision stream ends with [n, tokens, width], call by call.

    Rows are those that the tower computed: hooks that repeat them for several questions come later.
    """
    seen: list[Tensor] = []
    tower = family_of(model).streams(model)["vision"].root
    handle = tower.register_forward_hook(lambda _, __, output: seen.append(output[0]))
    try:
        yield seen
    finally:
        handle.remove()


def _restore(tensors: dict[str, Tensor], model: Any, head: nn.Module | None, optimizer: Optimizer) -> None:
    model.load_state_dict(with_prefix(tensors, "model."))
    optimizer.load_state_tensors(with_prefix(tensors, "optimizer."))
    if head is not None:
        head.load_state_dict(with_prefix(tensors, "head."))
