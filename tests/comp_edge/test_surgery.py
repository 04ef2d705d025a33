"""Masked and shrunk models agree; what cannot be shrunk is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from comp_edge.errors import InputError
from comp_edge.families import family_of
from comp_edge.masks import UnitMasks
from comp_edge.plan import LayerPlan, Plan, StreamPlan
from comp_edge.schedule import attach
from comp_edge.surgery import apply_plan
from comp_edge.units import Site, dense_plan, kept_kv_heads, mask_of, sites, unit_count
from tests.comp_edge.plans import tiny_plan


def masked_logits(model: Any, plan: Plan, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Logits of the dense model with the plan's units masked and its tokens dropped."""
    streams = family_of(model).streams(model)
    masks = UnitMasks(streams)
    schedule = attach(model, {name: stream.tokens for name, stream in plan.streams.items()})
    for site in sites(streams):
        kept = getattr(plan.streams[site.stream].layers[site.layer], site.kind)
        masks.masks[site] = mask_of(kept, unit_count(streams, site))
        if site.kind == "heads":
            schedule.head_masks[(site.stream, site.layer)] = masks.masks[site]
    logits = model(**inputs).logits
    masks.detach()
    schedule.detach()
    return logits


def replace_layer(plan: Plan, stream: str, index: int, layer: LayerPlan) -> Plan:
    old = plan.streams[stream]
    layers = tuple(layer if i == index else kept for i, kept in enumerate(old.layers))
    return plan.model_copy(update={"streams": {**plan.streams, stream: StreamPlan(layers=layers, tokens=old.tokens)}})


@torch.no_grad()
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_masked_equals_shrunk(make_model: Any, tiny_task: Any, seed: int, kv_heads: int) -> None:
    """For multi-head, grouped and multi-query attention, biases included, with sub-layers pruned away."""
    model = make_model(seed=seed, kv_heads=kv_heads, language_bias=True)
    plan = tiny_plan(prompt=tiny_task.prompt_length - 16)
    if kv_heads == 1:
        plan = replace_layer(plan, "language", 0, LayerPlan(heads=(1, 3), ffn=tuple(range(9))))
    batch = tiny_task.batch("val", list(range(6)))
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "pixel_values", "labels")}
    masked = masked_logits(model, plan, inputs)
    apply_plan(model, plan)
    shrunk = model(**inputs).logits
    assert (masked - shrunk).abs().max() <= 1e-5
    assert masked.abs().max() > 0.1  # the comparison is about something


@torch.no_grad()
def test_the_dense_plan_changes_nothing(tiny_model: Any, tiny_task: Any) -> None:
    inputs = tiny_task.example_inputs()
    before = tiny_model(**inputs).logits
    apply_plan(tiny_model, dense_plan(tiny_model, prompt_tokens=tiny_task.prompt_length - 16, base="tiny"))
    real = inputs["attention_mask"] > 0
    assert torch.allclose(tiny_model(**inputs).logits[real], before[real], atol=1e-5)


def test_weights_are_really_gone(tiny_model: Any, tiny_task: Any) -> None:
    def in_layers() -> int:
        return sum(p.numel() for name, p in tiny_model.named_parameters() if "layers" in name)

    before = in_layers()
    apply_plan(tiny_model, tiny_plan(prompt=tiny_task.prompt_length - 16))
    layer = tiny_model.model.vision_tower.encoder.layers[1]
    assert layer.self_attn.q_proj.weight.shape == (24, 32) and layer.self_attn.out_proj.weight.shape == (32, 24)
    assert layer.mlp.fc1.weight.shape == (32, 32) and layer.mlp.fc1.out_features == 32
    assert in_layers() < 0.6 * before
    llama = tiny_model.model.language_model.layers[0].self_attn
    assert llama.k_proj.out_features == 16 and llama.num_key_value_groups == 1


def test_one_query_head_of_each_group_or_a_whole_group() -> None:
    assert kept_kv_heads((0, 2, 4), heads=6, kv_heads=3) == [0, 1, 2]
    assert kept_kv_heads((2, 3), heads=6, kv_heads=3) == [1]
    assert kept_kv_heads((), heads=6, kv_heads=3) == []
    with pytest.raises(ValueError, match="same number"):
        kept_kv_heads((0, 1, 2), heads=6, kv_heads=3)


@pytest.mark.parametrize(
    ("stream", "index", "layer", "message"),
    [
        ("vision", 1, LayerPlan(heads=(0, 4), ffn=(0,)), "heads index 4 in layer 1 of stream 'vision'.*has 4"),
        ("language", 2, LayerPlan(heads=(0, 1), ffn=(0, 64)), "ffn index 64 in layer 2 of stream 'language'"),
        ("language", 0, LayerPlan(heads=(0, 1, 2), ffn=(0,)), "layer 0 of stream 'language'.*same number"),
        ("vision", 0, LayerPlan(heads=(), ffn=(0,)), "drops tokens before layer 1.*no layer before it"),
    ],
)
def test_plans_that_do_not_fit_say_where(
    tiny_model: Any, tiny_task: Any, stream: str, index: int, layer: LayerPlan, message: str
) -> None:
    plan = replace_layer(tiny_plan(prompt=tiny_task.prompt_length - 16), stream, index, layer)
    before = {name: tensor.clone() for name, tensor in tiny_model.state_dict().items()}
    with pytest.raises(InputError, match=message):
        apply_plan(tiny_model, plan)
    after = tiny_model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)


def test_plans_of_another_model_are_refused(tiny_model: Any, make_model: Any, tiny_task: Any) -> None:
    plan = tiny_plan(prompt=tiny_task.prompt_length - 16)
    with pytest.raises(InputError, match="'blip'.*'llava'"):
        apply_plan(tiny_model, plan.model_copy(update={"model_type": "blip"}))
    with pytest.raises(InputError, match="3 layers in stream 'vision', the model has 4"):
        apply_plan(make_model(vision_layers=4), plan)
    with pytest.raises(InputError, match="must compute on all 17 tokens, the plan says 12"):
        apply_plan(tiny_model, plan.with_tokens("vision", (12, 12, 9)))
    with pytest.raises(InputError, match="8 image tokens and at least one prompt token"):
        apply_plan(tiny_model, plan.with_tokens("language", (8, 7, 7)))


def test_sites_leave_out_what_is_gone(tiny_model: Any, tiny_task: Any) -> None:
    apply_plan(tiny_model, tiny_plan(prompt=tiny_task.prompt_length - 16))
    streams = family_of(tiny_model).streams(tiny_model)
    found = sites(streams)
    assert Site("vision", 2, "ffn") not in found and Site("language", 1, "heads") not in found
    assert unit_count(streams, Site("vision", 2, "ffn")) == 0
    with pytest.raises(KeyError):
        UnitMasks(streams).unit_sizes[Site("vision", 2, "ffn")]
