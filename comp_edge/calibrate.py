"""Statistics of a calibration set, in streaming form: what units and tokens matter."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from comp_edge.importance import Norm, input_energy, normalize, per_unit, token_weights, wanda
from comp_edge.masks import UnitMasks
from comp_edge.placement import CPU, placed
from comp_edge.schedule import Schedule
from comp_edge.tasks.packing import model_inputs
from comp_edge.units import Site


@dataclass(frozen=True)
class Draws:
    """The first `count` training batches of a seed, drawn anew whenever they are gone through: none is kept.

    Attributes:
        device: where they are wanted.
    """

    task: Any
    seed: int
    count: int
    device: torch.device = CPU

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return iter(placed(islice(self.task.train_batches(self.seed), self.count), self.device))


@dataclass
class TokenStatistics:
    """Normalised token importance of each layer, over the calibration set.

    Attributes:
        scores: per (stream, layer), sorted descending per example: a list of [b, n] on the CPU (invalid tokens 0). The
            entry after the last layer is of what a connector makes of them. They grow with the calibration set, by one
            number a token and layer, which is a thousandth of its activations.
    """

    scores: dict[tuple[str, int], list[Tensor]] = field(default_factory=dict)

    def above(self, stream: str, layer: int, threshold: float) -> float:
        """Mean number of tokens per example whose importance reaches a threshold."""
        batches = self.scores[(stream, layer)]
        count = sum(float((scores >= threshold).sum()) for scores in batches)
        return count / sum(len(scores) for scores in batches)


@dataclass
class _Waiting:
    """The input of an output projection whose token weights are not known yet."""

    site: Site
    inputs: Tensor
    kept: Tensor | None


class Collector:
    """Listens to forward passes: input energies of all output projections (CIP or plain), and token importance.

    The feed-forward of layer l is weighted by the token importance of layer l + 1, attention by that of layer l
    (DESIGN section 5). A layer's importance is known when the next one begins, so that the inputs of at most three
    projections a stream wait for their weights at any time, and one more where cross-attention lies between its layers.
    Besides them only sums are kept, and in `TokenStatistics` one number a token and layer.

    Args:
        cip: weigh tokens by their normalised importance; plain structured Wanda otherwise.
        norm: how token importance is normalised.
    """

    def __init__(self, masks: UnitMasks, schedule: Schedule, *, cip: bool, norm: Norm = "mean") -> None:
        self.masks, self.schedule, self.cip, self.norm = masks, schedule, cip, norm
        self.energy: dict[Site, Tensor] = {}
        self.tokens = TokenStatistics()
        self._waiting: list[_Waiting] = []
        self._handles: list[Any] = []

    def __enter__(self) -> Collector:
        self.schedule.observe = self._observe
        for site in self.masks.unit_sizes:
            self._handles.append(self.masks.sink(site).register_forward_pre_hook(self._hook(site)))
        return self

    def __exit__(self, *_: object) -> None:
        self.schedule.observe = None
        for handle in self._handles:
            handle.remove()

    def _hook(self, site: Site) -> Callable:
        def listen(module: Any, args: tuple) -> None:
            self._waiting.append(_Waiting(site, args[0].detach(), self.schedule.kept(site.stream)))

        return listen

    def _observe(self, stream: str, layer: int, scores: Tensor, valid: Tensor) -> None:
        view = self.schedule.streams[stream]
        cls = view.protected == "first"
        normal = normalize(scores.float(), self.norm, valid=valid)
        self.tokens.scores.setdefault((stream, layer), []).append(normal.sort(1, descending=True).values.to(CPU))
        if layer == len(view.layers):
            return  # what the connector hands on is no input of a layer here
        weights = token_weights(normal, valid=valid, cls=cls) if self.cip else valid.float()
        # CIP's feed-forward waits for the next layer's importance; plain Wanda counts every token of its own layer.
        last = layer == len(view.layers) - 1 or not self.cip
        ready, self._waiting = _split(
            self._waiting,
            lambda w: (
                (self.schedule.streams[w.site.stream].follows or w.site.stream) == stream
                and (w.site.layer < layer or w.site.layer == layer and (w.site.kind == "heads" or last))
            ),
        )
        kept = self.schedule.kept(stream)
        for waiting in ready:
            # Packed streams have no batch dimension.
            inputs = waiting.inputs.reshape(len(weights), -1, waiting.inputs.shape[-1])
            energy = input_energy(inputs, _align(weights, kept, waiting.kept, inputs.shape[1]))
            self.energy[waiting.site] = self.energy.get(waiting.site, 0) + energy

    def ranked_tokens(self) -> TokenStatistics:
        """Importance of tokens.

        Raises:
            FloatingPointError: one was not finite.
        """
        for (stream, layer), batches in self.tokens.scores.items():
            if not all(bool(scores.isfinite().all()) for scores in batches):
                raise FloatingPointError(f"token importance in layer {layer} of stream {stream!r} is not finite")
        return self.tokens

    def wanda(self) -> dict[Site, Tensor]:
        """Structured Wanda (CIP where asked for) of every unit, [units] per site, on the CPU.

        Raises:
            FloatingPointError: an activation was not finite.
        """
        _check_finite(self.energy, "activations")
        return {
            site: per_unit(wanda(self.masks.sink(site).weight, energy), self.masks.unit_sizes[site]).to(CPU)
            for site, energy in self.energy.items()
        }


def _split(items: list, condition: Callable[[Any], bool]) -> tuple[list, list]:
    return [i for i in items if condition(i)], [i for i in items if not condition(i)]


def _align(weights: Tensor, kept: Tensor | None, wanted: Tensor | None, count: int) -> Tensor:
    """Weights of the tokens `kept` now, for the tokens that an earlier layer had; those dropped since weigh nothing."""
    if kept is None or wanted is not None and torch.equal(kept, wanted):
        return weights
    width = int(max(kept.max(), 0 if wanted is None else wanted.max())) + 1
    spread = weights.new_zeros(len(weights), max(width, count if wanted is None else width)).scatter(1, kept, weights)
    return spread[:, :count] if wanted is None else spread.gather(1, wanted)


@torch.no_grad()
def collect(
    model: Any,
    masks: UnitMasks,
    schedule: Schedule,
    batches: Iterable[dict[str, Tensor]],
    *,
    cip: bool,
    cit: bool,
    norm: Norm,
) -> Collector:
    """Run the calibration batches through the model and listen.

    Args:
        cip, norm: see `Collector`.
        cit: token importance sees the head masks; otherwise removed heads have their say in it as they had before.
    """
    seen = schedule.head_masks
    with Collector(masks, schedule, cip=cip, norm=norm) as collector:
        try:
            if not cit:
                schedule.head_masks = {}
            for batch in batches:
                model(**model_inputs(model, batch))
        finally:
            schedule.head_masks = seen
    return collector


def gradient_scores(
    model: Any, task: Any, masks: UnitMasks, batches: Iterable[dict[str, Tensor]], *, power: int
) -> dict[Site, Tensor]:
    """Importance of every unit by the gradient g of the loss by its mask, summed over batches, [units] per site on the CPU.

    With a mask at 1, removing its unit changes the loss by about -g. `power` 1 sums |g|, first-order Taylor importance;
    2 sums g^2, the diagonal of the empirical Fisher information (the finer the batches, the closer).

    Raises:
        FloatingPointError: a gradient is not finite.
    """
    current = dict(masks.masks)
    leaves = {site: mask.detach().clone().requires_grad_(True) for site, mask in current.items()}
    masks.masks = dict(leaves)
    total = {site: torch.zeros_like(mask) for site, mask in current.items()}
    try:
        for batch in batches:
            gradients = torch.autograd.grad(task.loss(model, batch), list(leaves.values()), allow_unused=True)
            for site, gradient in zip(leaves, gradients, strict=True):
                if gradient is not None:
                    total[site] += gradient.detach().abs() ** power
    finally:
        masks.masks = current
    _check_finite(total, "gradients")
    return {site: value.to(CPU) for site, value in total.items()}


def _check_finite(found: Mapping[Site, Tensor], what: str) -> None:
    for site, value in found.items():
        if not bool(value.isfinite().all()):
            raise FloatingPointError(
                f"{what} at the {site.kind} of layer {site.layer} in stream {site.stream!r} are not finite"
            )
