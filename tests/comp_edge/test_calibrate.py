"""Streaming statistics against a straightforward computation in two passes, token by token."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from comp_edge.calibrate import Collector, TokenStatistics, collect, gradient_scores, model_inputs
from comp_edge.families import family_of
from comp_edge.importance import normalize, token_importance
from comp_edge.masks import UnitMasks
from comp_edge.schedule import attach
from comp_edge.units import Site, sites, unit_count

# 17 vision tokens become 9, so 8 image tokens and 8 of the prompt reach the language model.
SCHEDULES = {
    "dense": {"vision": (17, 17, 17), "language": (24, 24, 24)},
    "vision": {"vision": (17, 12, 9), "language": (16, 16, 16)},
    "language": {"vision": (17, 17, 17), "language": (24, 13, 7)},
    "both": {"vision": (17, 12, 9), "language": (16, 11, 6)},
    "late": {"vision": (17, 17, 9), "language": (16, 16, 6)},
}


@pytest.fixture
def model(make_model):
    return make_model(language_bias=True)


@pytest.fixture(scope="module")
def batches(tiny_task) -> list[dict[str, Tensor]]:
    """Two batches; their prompts differ in length (left padding) and have answers behind them."""
    found = list(itertools.islice(tiny_task.train_batches(3), 2))
    assert all(batch["attention_mask"].min() == 0 for batch in found)
    return found


def set_up(model: Any, schedule: str) -> tuple[UnitMasks, Any]:
    masks = UnitMasks(family_of(model).streams(model))
    return masks, attach(model, SCHEDULES[schedule])


class Record:
    """First pass: the input of every output projection and the scores of every layer, by dense token index."""

    def __init__(self, model: Any, masks: UnitMasks, schedule: Any, batch: dict[str, Tensor]) -> None:
        self.inputs: dict[Site, tuple[Tensor, Tensor]] = {}
        self.scores: dict[tuple[str, int], tuple[Tensor, Tensor, Tensor]] = {}
        self.schedule = schedule
        handles = [masks.sink(site).register_forward_pre_hook(self._hook(site)) for site in masks.unit_sizes]
        schedule.observe = self._observe
        with torch.no_grad():
            model(**model_inputs(model, batch))
        schedule.observe = None
        for handle in handles:
            handle.remove()

    def _tokens(self, stream: str, like: Tensor) -> Tensor:
        kept = self.schedule.kept(stream)
        return torch.arange(like.shape[1]).expand(like.shape[:2]) if kept is None else kept

    def _hook(self, site: Site) -> Any:
        def listen(module: Any, args: tuple) -> None:
            self.inputs[site] = (args[0], self._tokens(site.stream, args[0]))

        return listen

    def _observe(self, stream: str, layer: int, scores: Tensor, valid: Tensor) -> None:
        self.scores[(stream, layer)] = (scores, valid, self._tokens(stream, scores))

    def weights(self, stream: str, layer: int, example: int, *, cip: bool) -> dict[int, float]:
        """omega of each token that counts in a layer."""
        scores, valid, tokens = (part[example] for part in self.scores[(stream, layer)])
        known = {int(t): float(s) for t, s, v in zip(tokens, scores, valid, strict=True) if v}
        if not cip:
            return dict.fromkeys(known, 1.0)
        cls = stream == "vision"
        total = sum(score for token, score in known.items() if not (cls and token == 0))
        return {token: 1.0 if cls and token == 0 else score / total for token, score in known.items()}


def two_passes(model: Any, masks: UnitMasks, schedule: Any, batches: list, *, cip: bool) -> dict[Site, Tensor]:
    """S^p of every unit. CIP: attention by S^t of its layer, feed-forward by that of the next (the last by its own).
    Without CIP each real prompt token that a layer computes on counts once."""
    energy: dict[Site, Tensor] = {}
    for batch in batches:
        record = Record(model, masks, schedule, batch)
        for site, (inputs, tokens) in record.inputs.items():
            total = energy.setdefault(site, torch.zeros(inputs.shape[2], dtype=torch.float64))
            layers = len(masks.streams[site.stream].layers)
            source = min(site.layer + 1, layers - 1) if cip and site.kind == "ffn" else site.layer
            for example in range(len(inputs)):
                weights = record.weights(site.stream, source, example, cip=cip)
                for position, token in enumerate(tokens[example].tolist()):
                    total += weights.get(token, 0.0) * inputs[example, position].double() ** 2
    importance = {}
    for site, total in energy.items():
        channels = masks.sink(site).weight.double().abs().mean(0) * total.sqrt()
        size = masks.unit_sizes[site]
        importance[site] = torch.stack([part.mean() for part in channels.split(size)]).float()
    return importance


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("cip", [True, False], ids=["cip", "wanda"])
def test_parameter_importance(model, batches, schedule, cip):
    masks, active = set_up(model, schedule)
    expected = two_passes(model, masks, active, batches, cip=cip)
    got = collect(model, masks, active, batches, cip=cip, cit=True, norm="mean").wanda()
    assert set(got) == set(expected) == set(masks.unit_sizes)
    for site in expected:
        torch.testing.assert_close(
            got[site], expected[site].detach(), rtol=1e-4, atol=1e-7, msg=lambda m, s=site: f"{s}: {m}"
        )


def test_cip_differs_from_wanda(model, batches):
    """Otherwise the comparison above would prove nothing."""
    masks, active = set_up(model, "both")
    cip, plain = (collect(model, masks, active, batches, cip=c, cit=True, norm="mean").wanda() for c in (True, False))
    correlations = [torch.corrcoef(torch.stack([cip[s], plain[s]]))[0, 1] for s in cip if s.kind == "ffn"]
    assert all(c < 0.999 for c in correlations)


def test_without_cit_removed_heads_have_their_say(model, batches):
    """As before they were removed; the drops of the pass itself see the mask again afterwards."""
    masks, active = set_up(model, "dense")
    site = next(site for site in masks.unit_sizes if site.kind == "heads" and site.stream == "vision")
    mask = torch.ones(unit_count(masks.streams, site))
    before = collect(model, masks, active, batches, cip=False, cit=True, norm="mean").tokens.scores
    mask[1:] = 0
    active.head_masks[(site.stream, site.layer)] = mask
    seen, whole = (
        collect(model, masks, active, batches, cip=False, cit=c, norm="mean").tokens.scores for c in (True, False)
    )
    place = (site.stream, site.layer)
    assert active.head_masks[place] is mask
    assert all(torch.equal(a, b) for a, b in zip(whole[place], before[place], strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(seen[place], before[place], strict=True))


@torch.no_grad()
def test_token_importance_of_the_dense_model(model, batches):
    """The observed scores are those of transformers' own attention weights."""
    model.set_attn_implementation("eager")
    batch = batches[0]
    inputs = model_inputs(model, batch)
    language = model(**inputs, output_attentions=True).attentions
    vision = model.model.vision_tower(pixel_values=batch["pixel_values"], output_attentions=True).attentions
    masks, active = set_up(model, "dense")
    got = collect(model, masks, active, [batch], cip=True, cit=True, norm="mean").tokens.scores
    prompt = (batch["labels"] == -100) & (batch["attention_mask"] == 1)
    for stream, attentions in (("vision", vision), ("language", language)):
        valid = prompt if stream == "language" else None
        for layer, attention in enumerate(attentions):
            scores = normalize(token_importance(attention, queries=valid), "mean", valid=valid)
            expected = scores.sort(1, descending=True).values
            torch.testing.assert_close(got[(stream, layer)][0], expected, rtol=1e-4, atol=1e-5)


def test_batches_add_up(model, batches):
    masks, active = set_up(model, "both")
    one, two, both = (
        collect(model, masks, active, chosen, cip=True, cit=True, norm="mean").energy
        for chosen in (batches[:1], batches[1:], batches)
    )
    for site, energy in both.items():
        torch.testing.assert_close(energy, one[site] + two[site])


@pytest.mark.parametrize("layer", [1, 2])
@pytest.mark.parametrize("stream", ["vision", "language"])
def test_a_layer_without_live_heads(model, batches, stream, layer):
    """It ranks nothing; every other sub-layer is scored all the same, batch by batch."""
    masks, active = set_up(model, "dense")
    dead = Site(stream, layer, "heads")
    masks.masks = {dead: torch.zeros(4)}
    active.head_masks[(stream, layer)] = torch.zeros(4)

    def energy(chosen: list) -> dict[Site, Tensor]:
        return collect(model, masks, active, chosen, cip=True, cit=True, norm="mean").energy

    both = energy(batches)
    assert set(both) >= set(masks.unit_sizes) - {dead}
    one, two = energy(batches[:1]), energy(batches[1:])
    for site, value in both.items():
        torch.testing.assert_close(value, one[site] + two[site])


def test_removed_units_have_no_importance(model, batches):
    masks, active = set_up(model, "dense")
    mask = torch.tensor([1.0, 0.0, 1.0, 1.0])
    masks.masks = {Site("vision", 1, "heads"): mask}
    got = collect(model, masks, active, batches, cip=True, cit=True, norm="mean").wanda()
    assert ((got[Site("vision", 1, "heads")] > 0) == mask.bool()).all()


def test_the_collector_leaves_no_trace(model, batches):
    masks, active = set_up(model, "both")
    with torch.no_grad():
        before = model(**model_inputs(model, batches[0])).logits
    hooks = [len(masks.sink(site)._forward_pre_hooks) for site in masks.unit_sizes]
    collector = collect(model, masks, active, batches, cip=True, cit=True, norm="mean")
    assert active.observe is None
    assert hooks == [len(masks.sink(site)._forward_pre_hooks) for site in masks.unit_sizes]
    with torch.no_grad():
        assert torch.equal(model(**model_inputs(model, batches[0])).logits, before)
    energies = {site: energy.clone() for site, energy in collector.energy.items()}
    with torch.no_grad():
        model(**model_inputs(model, batches[1]))
    assert all(torch.equal(collector.energy[site], energy) for site, energy in energies.items())
    assert not any(energy.requires_grad for energy in energies.values())


def test_the_collector_leaves_when_a_batch_fails(model, batches):
    masks, active = set_up(model, "dense")
    with pytest.raises(RuntimeError, match="broken"), Collector(masks, active, cip=True):
        raise RuntimeError("broken")
    assert active.observe is None
    assert all(len(masks.sink(site)._forward_pre_hooks) == 1 for site in masks.unit_sizes)


def test_tokens_above_a_threshold():
    statistics = TokenStatistics(
        scores={("vision", 1): [torch.tensor([[3.0, 0.5, 0.0], [1.0, 1.0, 0.2]]), torch.tensor([[2.0, 0.9]])]}
    )
    assert statistics.above("vision", 1, 1.0) == pytest.approx(4 / 3)
    assert statistics.above("vision", 1, 0.5) == pytest.approx(6 / 3)
    assert statistics.above("vision", 1, 9.0) == 0.0


@pytest.mark.parametrize("schedule", ["dense", "both"])
def test_taylor(model, tiny_task, batches, schedule):
    """The gradient by a mask at 1 is the inner product of the masked columns with their own gradient."""
    masks, _ = set_up(model, schedule)
    streams = masks.streams
    masks.masks = {site: torch.ones(unit_count(streams, site)) for site in sites(streams)}
    got = gradient_scores(model, tiny_task, masks, batches, power=2)
    expected = {site: torch.zeros(unit_count(streams, site)) for site in masks.masks}
    for batch in batches:
        model.zero_grad()
        tiny_task.loss(model, batch).backward()
        for site in expected:
            weight = masks.sink(site).weight
            channels = (weight.detach() * weight.grad).sum(0)
            expected[site] += torch.stack([part.sum() for part in channels.split(masks.unit_sizes[site])]) ** 2
    for site in expected:
        torch.testing.assert_close(got[site], expected[site], rtol=2e-3, atol=1e-9)
        assert math.isfinite(float(got[site].sum())) and float(got[site].sum()) > 0


def test_taylor_restores_the_masks_whatever_happens(model, tiny_task, batches):
    masks, _ = set_up(model, "dense")
    before = masks.masks = {Site("vision", 0, "heads"): torch.ones(4)}
    gradient_scores(model, tiny_task, masks, batches[:1], power=2)
    assert masks.masks is before or masks.masks == before
    assert not masks.masks[Site("vision", 0, "heads")].requires_grad

    class Broken:
        def loss(self, model: Any, batch: Any) -> Tensor:
            raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        gradient_scores(model, Broken(), masks, batches[:1], power=2)
    assert list(masks.masks) == [Site("vision", 0, "heads")]
    assert not masks.masks[Site("vision", 0, "heads")].requires_grad
    assert all(parameter.grad is None for parameter in model.parameters())
