"""Masks on units: what they multiply, and what a zero means."""

from __future__ import annotations

import copy

import pytest
import torch

from comp_edge.families import family_of
from comp_edge.masks import UnitMasks
from comp_edge.units import Site, mask_of, sites, unit_count


@pytest.fixture
def model(make_model):
    return make_model(language_bias=True)


@pytest.fixture
def inputs(tiny_task):
    return tiny_task.example_inputs()


@torch.no_grad()
def logits(model, inputs):
    return model(**inputs).logits


def test_units_of_a_genuine_model(model):
    masks = UnitMasks(family_of(model).streams(model))
    assert set(masks.unit_sizes) == {
        Site(s, i, k) for s in ("vision", "language") for i in range(3) for k in ("heads", "ffn")
    }
    for site, size in masks.unit_sizes.items():
        assert size == (8 if site.kind == "heads" else 1)
    assert masks.sink(Site("vision", 1, "heads")) is model.model.vision_tower.encoder.layers[1].self_attn.out_proj
    assert masks.sink(Site("language", 2, "ffn")) is model.model.language_model.layers[2].mlp.down_proj


def test_ones_and_missing_masks_change_nothing(model, inputs):
    dense = logits(model, inputs)
    streams = family_of(model).streams(model)
    masks = UnitMasks(streams)
    assert torch.equal(logits(model, inputs), dense)
    masks.masks = {site: torch.ones(unit_count(streams, site)) for site in sites(streams)}
    assert torch.equal(logits(model, inputs), dense)


@pytest.mark.parametrize(
    "site",
    [Site("vision", 1, "heads"), Site("vision", 2, "ffn"), Site("language", 0, "heads"), Site("language", 2, "ffn")],
)
@pytest.mark.parametrize("fade", [0.0, 0.4])
def test_a_mask_scales_what_its_units_add(model, inputs, site, fade):
    """The same as scaling the units' columns of the projection they feed into; biases are not touched."""
    streams = family_of(model).streams(model)
    masks = UnitMasks(streams)
    units = unit_count(streams, site)
    mask = mask_of(range(0, units, 2), units)
    mask[mask == 0] = fade
    scaled = copy.deepcopy(model)
    for hooked in scaled.modules():
        hooked._forward_pre_hooks.clear()
    sink = UnitMasks(family_of(scaled).streams(scaled)).sink(site)
    with torch.no_grad():
        sink.weight.mul_(mask.repeat_interleave(masks.unit_sizes[site]))
    masks.masks = {site: mask}
    torch.testing.assert_close(logits(model, inputs), logits(scaled, inputs), atol=2e-5, rtol=1e-4)


def test_detach(model, inputs):
    dense = logits(model, inputs)
    masks = UnitMasks(family_of(model).streams(model))
    masks.masks = {Site("language", 0, "ffn"): torch.zeros(64)}
    assert not torch.allclose(logits(model, inputs), dense)
    masks.detach()
    assert torch.equal(logits(model, inputs), dense)
    masks.detach()  # twice is once


def test_masks_can_be_learned_through(model, inputs):
    masks = UnitMasks(family_of(model).streams(model))
    mask = torch.ones(4, requires_grad=True)
    masks.masks = {Site("vision", 0, "heads"): mask}
    model(**inputs).logits.square().mean().backward()
    assert mask.grad is not None and bool((mask.grad != 0).all())


def test_masks_follow_the_activations_type(model, inputs):
    masks = UnitMasks(family_of(model).streams(model))
    masks.masks = {Site("language", 0, "heads"): torch.ones(4)}
    model.to(torch.bfloat16)
    inputs["pixel_values"] = inputs["pixel_values"].to(torch.bfloat16)
    assert logits(model, inputs).dtype == torch.bfloat16


def test_mask_of():
    assert mask_of([0, 3], 5).tolist() == [1.0, 0.0, 0.0, 1.0, 0.0]
    assert mask_of([], 2).tolist() == [0.0, 0.0]
