"""Per-image token counts: the counterpart of a static schedule, with one threshold on importance a drop point.

Each image keeps the tokens whose importance, divided by its mean within the image, reaches the threshold; CLS always stays.
Thresholds are such that over many training images each layer keeps as many tokens on average as the static schedule says.

Images of a batch then keep different numbers. They are padded to the largest, and padding is seen by nobody: its keys are
masked in the vision stream and in the cross-attention that reads it, its queries do not count in importance. An image's
result is what it would be alone, which saves no time in a batch; what is compared is how good the answers are at equal mean
multiply-accumulates.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from comp_edge.cost import Cost
from comp_edge.errors import InputError
from comp_edge.families import family_of
from comp_edge.importance import Norm, normalize
from comp_edge.optim import Optimizer, warmup_cosine
from comp_edge.plan import Plan
from comp_edge.recovery import Distillation
from comp_edge.schedule import active_schedule
from comp_edge.session import WARMUP
from comp_edge.settings import PruneConfig
from comp_edge.tasks import Task
from comp_edge.tasks.folding import distinct_images
from comp_edge.tasks.packing import PIXELS

STREAM = "vision"
EVERY = 50  # optimizer steps after which thresholds are set anew: training moves importance


def check_per_image(model: Any) -> None:
    """Whether the images of a batch can keep different numbers of tokens.

    Raises:
        InputError: the language model takes image tokens in among its own (its prompt has one length), or the vision stream has
            no CLS token, or nowhere to drop tokens.
    """
    family = family_of(model)
    stream = family.streams(model)[STREAM]
    if family.fusion(model) is not None:
        raise InputError(
            f"{type(model).__name__} reads image tokens among those of its prompt, which are as many for every image; "
            "thresholds are for models that attend to the image or compare with it, such as blip-digits."
        )
    if stream.packed or stream.protected != "first" or not stream.drops:
        raise InputError(
            f"{type(model).__name__} has no vision stream with a CLS token and layers between which tokens are dropped; "
            "thresholds are for models that have, such as blip-digits."
        )


class Thresholds:
    """Lets the vision stream of a scheduled model keep a number of tokens of its own for each image.

    Where tokens may fall is as the active schedule says; how many, as the thresholds say.

    Attributes:
        values: the threshold of each drop point, as set by `calibrate`.
    """

    def __init__(self, model: Any, values: dict[int, float] | None = None, *, norm: Norm = "mean") -> None:
        check_per_image(model)
        self.model, self.norm = model, norm
        self.values = dict(values or {})
        self.schedule = active_schedule(model)
        self._calibrating = False
        self._noted: list[Tensor] | None = None
        self._latest: dict[int, Tensor] = {}
        self._handles: list[Any] = []
        self._attach()

    def _attach(self) -> None:
        family, streams = family_of(self.model), self.schedule.streams
        for layer in streams[STREAM].layers:
            if layer.attn is None:
                continue
            if family.returns_probabilities:
                hook = layer.attn.module.dropout.register_forward_hook(self._mask_probabilities)
            else:
                hook = layer.attn.module.register_forward_pre_hook(self._mask_keys, with_kwargs=True)
            self._handles.append(hook)
        self._handles.append(streams[STREAM].root.register_forward_hook(self._end))
        for name, stream in streams.items():
            if family.shape(self.model, name).keys_from == STREAM:
                for layer in stream.layers:
                    if layer.attn is not None:
                        self._handles.append(
                            layer.attn.module.register_forward_pre_hook(_mask_padding, with_kwargs=True)
                        )
        self.schedule.decide = self._decide

    def detach(self) -> None:
        """Every image keeps what the schedule says again."""
        self.schedule.decide = None
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    # ---- how many stay

    def _decide(self, stream: str, layer: int, scores: Tensor, valid: Tensor) -> tuple[Tensor, Tensor] | None:
        if stream != STREAM:
            return None
        importance = normalize(scores.float(), self.norm, valid=valid)
        open_ = valid.clone()
        open_[:, 0] = False  # CLS
        if self._calibrating:
            self.values[layer] = threshold_for(importance[open_], stay=self._static(layer) - 1, images=len(scores))
        stays = 1 + (open_ & (importance >= self.values[layer])).sum(1)
        self._latest[layer] = stays
        return scores, stays

    def _static(self, layer: int) -> int:
        return self.schedule.tokens[STREAM][layer]

    @torch.no_grad()
    def calibrate(self, pixels: Tensor) -> None:
        """Set the thresholds so that these images keep as many tokens on average as the static schedule says.

        One pass does: a drop point's threshold is set as soon as the layers before it have run.

        Args:
            pixels: [images, 3, H, W]
        """
        training = self.model.training
        self.model.eval()
        self._calibrating = True
        try:
            self.schedule.streams[STREAM].root(pixel_values=pixels)
        finally:
            self._calibrating = False
            self.model.train(training)

    @contextmanager
    def noting(self) -> Iterator[list[Tensor]]:
        """While active, the tokens that each layer computes on, [images, layers] a forward pass."""
        self._noted = noted = []
        try:
            yield noted
        finally:
            self._noted = None

    def _counts(self, images: int) -> Tensor:
        """[images, layers] of the latest pass."""
        now = torch.full((images,), self._static(0))
        columns = []
        for layer in range(len(self.schedule.streams[STREAM].layers)):
            now = self._latest.get(layer, now)
            columns.append(now)
        return torch.stack(columns, 1)

    # ---- padding is seen by nobody

    def _padding(self) -> Tensor | None:
        """[images, n] bool, the slots of the running layer that hold no token; None where all do."""
        kept = self.schedule.kept(STREAM)
        if kept is None:
            return None
        padding = ~self.schedule.reached(STREAM).gather(1, kept)
        return padding if bool(padding.any()) else None

    def _mask_probabilities(self, module: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
        """Hook between softmax and values, for attention that takes no mask: the softmax of what is left."""
        if (padding := self._padding()) is None:
            return None
        left = output.masked_fill(padding[:, None, None], 0.0)
        return left / left.sum(-1, keepdim=True)

    def _mask_keys(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        if (padding := self._padding()) is None:
            return None
        return args, kwargs | {"attention_mask": _additive(padding, self.model.dtype)}

    def _end(self, module: nn.Module, args: tuple, output: Any) -> Any:
        """Hook of the vision stream: its padding reads zero from here on."""
        if (padding := self._padding()) is not None:
            output.last_hidden_state = output.last_hidden_state.masked_fill(padding[..., None], 0.0)
        if self._noted is not None:
            self._noted.append(self._counts(len(output.last_hidden_state)))
        self._latest.clear()
        return output


def _mask_padding(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
    """Pre-hook of a cross-attention: it does not attend to what reads zero, which no token does behind a norm."""
    states = kwargs.get("encoder_hidden_states")
    if states is None:
        return None
    padding = (states == 0).all(-1)
    return args, kwargs | {"encoder_attention_mask": _additive(padding, states.dtype)}


def _additive(padding: Tensor, dtype: torch.dtype) -> Tensor:
    """[images, 1, 1, n], added to logits."""
    mask = torch.zeros_like(padding, dtype=dtype).masked_fill(padding, torch.finfo(dtype).min)
    return mask[:, None, None]


def threshold_for(importance: Tensor, *, stay: float, images: int) -> float:
    """The threshold that so many tokens an image reach on average, exactly as far as importance has no ties.

    Args:
        importance: [tokens of all images], protected ones left out.
        stay: tokens an image.
    """
    count = min(round(stay * images), len(importance))
    if count == len(importance):
        return 0.0
    ordered = importance.sort(descending=True).values
    # Between the last that stays and the first that goes: rounding in another batch must not tip it.
    edge = ordered[count - 1] if count else ordered[0] + 1
    return float((edge + ordered[count]) / 2)


def calibration_pixels(batches: Iterable[dict[str, Tensor]], images: int) -> Tensor:
    """[images, 3, H, W] of batches, each distinct image of a batch once."""
    found: list[Tensor] = []
    for batch in batches:
        pixels = batch[PIXELS]
        found.append(pixels[distinct_images(batch["image_ids"])[0]] if "image_ids" in batch else pixels)
        if sum(map(len, found)) >= images:
            break
    return torch.cat(found)[:images]


# ---- both sides of the comparison


def train_scheduled(
    model: Any,
    task: Task,
    distillation: Distillation,
    *,
    steps: int,
    seed: int,
    config: PruneConfig,
    recalibrate: Callable[[], None] | None,
    tell: Callable[[int], None],
) -> int:
    """Train a model under the schedule that is active on it; returns the samples that it saw.

    Args:
        recalibrate: sets thresholds; called before the first step, every `EVERY` steps and after the last.
        tell: gets the steps that are done.
    """
    optimizer = Optimizer(model.named_parameters(), matrix_lr=config.matrix_lr, lr=config.lr, muon=config.muon)
    model.train()
    samples = 0
    for step, batch in enumerate(itertools.islice(task.train_batches(seed), steps)):
        if recalibrate is not None and step % EVERY == 0:
            recalibrate()
        objective, _ = distillation.objective(model, batch)
        optimizer.step(objective, factor=warmup_cosine(step, steps, warmup=WARMUP))
        samples += len(next(iter(batch.values())))
        tell(step + 1)
    if recalibrate is not None:
        recalibrate()
    model.eval()
    return samples


def mean_macs(cost: Cost, plan: Plan, counts: Sequence[Tensor]) -> float:
    """Mean cost of a request over images, each with its own token counts [images, layers] in the vision stream."""
    rows = Counter(tuple(row) for part in counts for row in part.tolist())
    total = sum(number * cost.predict(plan.with_tokens(STREAM, row)) for row, number in rows.items())
    return total / sum(rows.values())
