"""Families whose language model reads image features: the same promises for every one of them, on small genuine models."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from comp_edge.checkpoint import load_pretrained, save_pretrained
from comp_edge.cost import macs
from comp_edge.families import family_of
from comp_edge.plan import plan_of
from comp_edge.schedule import active_schedule, attach
from comp_edge.surgery import apply_plan
from comp_edge.units import dense_plan, request_of
from tests.comp_edge.plans import family_plan, mask_units, settled
from tests.families import CASES, FamilyCase, case_named

PLACEHOLDER = [case for case in CASES if case.generative and not case.name.startswith("blip")]
every_family = pytest.mark.parametrize("case", PLACEHOLDER, ids=str)


def reference(case: FamilyCase, model: Any, **options: Any) -> Any:
    """The request of row 0 alone."""
    return family_of(model).request(model, case.inputs([0], **options))


def build(case: FamilyCase, **options: Any) -> Any:
    """The family's small model. LLaVA leaves its last vision layer unused by default, though transformers runs it."""
    return case.model(**({"feature_layer": -1} if case.name == "llava" else {}), **options)


def pruned(case: FamilyCase, *, tokens: bool = True, units: bool = True, **options: Any) -> Any:
    model = build(case, **options)
    apply_plan(model, family_plan(model, reference(case, model), tokens=tokens, units=units))
    return model


def close(a: list[torch.Tensor], b: list[torch.Tensor], tolerance: float = 1e-5) -> bool:
    return all((x[-1] - y[-1]).abs().max() <= tolerance for x, y in zip(a, b, strict=True))


@torch.no_grad()
@every_family
def test_masked_equals_shrunk(case: FamilyCase) -> None:
    model = build(case, seed=1)
    plan, inputs = family_plan(model, reference(case, model)), case.inputs(4)
    masks = mask_units(model, plan)
    masked = model(**inputs).logits
    masks.detach()
    apply_plan(model, plan)
    assert (model(**inputs).logits - masked).abs().max() <= 1e-5
    assert masked.abs().max() > 0.1  # the comparison is about something


@torch.no_grad()
@every_family
def test_the_dense_plan_changes_nothing(case: FamilyCase) -> None:
    model, inputs = build(case), case.inputs(3, images_per_prompt=(1, 2, 0))
    before = case.outputs(model, inputs)
    apply_plan(model, dense_plan(model, base="", request=reference(case, model)))
    for a, b in zip(case.outputs(model, inputs), before, strict=True):
        assert torch.allclose(a, b, atol=1e-5)


@torch.no_grad()
@every_family
def test_layers_compute_on_the_tokens_of_the_plan(case: FamilyCase) -> None:
    model = pruned(case)
    seen: dict[str, list[int]] = {"vision": [], "language": []}
    for name, stream in active_schedule(model).streams.items():
        for layer in stream.layers:
            # Packed streams have no batch dimension.
            layer.norm_mlp.register_forward_hook(lambda m, args, out, n=name: seen[n].append(args[0].shape[-2]))
    model(**case.inputs([0]))
    assert {name: tuple(counts) for name, counts in seen.items()} == {
        name: stream.tokens for name, stream in plan_of(model).streams.items()
    }
    handed = active_schedule(model).handed("vision")
    if handed is not None:
        assert [len(kept) for kept in handed] == [plan_of(model).streams["vision"].delivered]


@torch.no_grad()
@every_family
@pytest.mark.parametrize("padding", ["left", "right"])
def test_examples_do_not_depend_on_their_batch(case: FamilyCase, padding: str) -> None:
    """Rows with one image, several and none, padded on either side, give what they give alone."""
    model, images = pruned(case), (1, 2, 0, 1)
    together = case.outputs(model, case.inputs(4, padding=padding, images_per_prompt=images))
    for row, count in enumerate(images):
        alone = case.outputs(model, case.inputs([row], padding=padding, images_per_prompt=count))
        assert close(alone, [together[row]])


@torch.no_grad()
@every_family
@pytest.mark.parametrize("images", [1, (2, 1, 0)], ids=["one image", "several"])
def test_generate_with_cache_equals_without(case: FamilyCase, images: Any) -> None:
    """Token for token, with drops in (or behind) the vision stream and inside the language model."""
    model, inputs = pruned(case), case.generate_inputs(3, images_per_prompt=images)
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    cached = model.generate(**inputs, **options)
    assert torch.equal(cached, model.generate(**inputs, **options, use_cache=False))
    given = inputs["input_ids"].shape[1]
    for row, count in enumerate([images] * 3 if images == 1 else images):
        alone = case.generate_inputs([row], images_per_prompt=count)
        one = model.generate(**alone, **options)
        assert torch.equal(one[0, alone["input_ids"].shape[1] :], cached[row, given:])


@torch.no_grad()
@every_family
def test_beams_and_decoding_by_hand(case: FamilyCase) -> None:
    model, inputs = pruned(case), case.generate_inputs(2)
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "num_beams": 3, "do_sample": False}
    together = model.generate(**inputs, **options)
    given = inputs["input_ids"].shape[1]
    for row in range(2):
        alone = case.generate_inputs([row])
        one = model.generate(**alone, **options)
        assert torch.equal(one[0, alone["input_ids"].shape[1] :], together[row, given:])
    # Prefill and one step without padding, where the model finds the positions itself.
    inputs = case.generate_inputs(2, padding=None)
    given = inputs["input_ids"].shape[1]
    prefill = model(**inputs, use_cache=True)
    token = prefill.logits[:, -1].argmax(-1, keepdim=True)
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(token)], 1)
    step = model(input_ids=token, attention_mask=mask, past_key_values=prefill.past_key_values)
    greedy = model.generate(**inputs, max_new_tokens=2, min_new_tokens=2, do_sample=False, output_logits=True,
                            return_dict_in_generate=True)  # fmt: skip
    if torch.equal(greedy.sequences[:, given], token[:, 0]):
        assert torch.allclose(step.logits[:, -1], greedy.logits[1], atol=1e-5)


@every_family
def test_saved_equals_loaded(case: FamilyCase, tmp_path: Path) -> None:
    model = pruned(case)
    keys = set(build(case).state_dict())
    save_pretrained(model, plan_of(model), tmp_path / "folder")
    loaded = load_pretrained(tmp_path / "folder")
    inputs = case.inputs(3)
    with torch.no_grad():
        assert (loaded(**inputs).logits - model(**inputs).logits).abs().max() <= 1e-6
    assert plan_of(loaded) == plan_of(model)
    # What is left carries the names that it had; a skipped sub-layer leaves at most a bias.
    stray = {name for name in loaded.state_dict() if name not in keys and not name.endswith(".bias")}
    assert not stray
    assert all(parameter.device.type == "cpu" for parameter in loaded.parameters())


@every_family
def test_training_changes_the_loss(case: FamilyCase) -> None:
    model, inputs = pruned(case), case.inputs(4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    before = case.loss(model, inputs)
    before.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    optimizer.step()
    after = case.loss(model, inputs)
    assert after.item() < before.item()


@torch.no_grad()
@every_family
def test_a_pruned_model_can_be_pruned_again(case: FamilyCase, tmp_path: Path) -> None:
    """First half of the units, then the rest of the plan, equals the whole plan at once; also through a folder."""
    whole, steps = build(case), build(case)
    request = reference(case, whole)
    plan, first = family_plan(whole, request), family_plan(whole, request, tokens=False)
    layers = list(first.streams["language"].layers)
    layers[1] = layers[1].model_copy(
        update={"heads": dense_plan(whole, base="", request=request).streams["language"].layers[1].heads}
    )
    half = first.streams["language"].model_copy(update={"layers": tuple(layers)})
    first = first.model_copy(update={"streams": {**first.streams, "language": half}})
    apply_plan(whole, plan)
    apply_plan(steps, first)
    save_pretrained(steps, first, tmp_path / "first")
    steps = load_pretrained(tmp_path / "first")
    apply_plan(steps, plan)
    inputs = case.inputs(2)
    assert torch.allclose(steps(**inputs).logits, whole(**inputs).logits, atol=1e-6)
    assert plan_of(steps) == plan


@torch.no_grad()
@every_family
@pytest.mark.parametrize("kind", ["dense", "pruned"])
def test_macs_agree_with_torchs_flop_counter(case: FamilyCase, kind: str) -> None:
    model = build(case)
    inputs = case.inputs([0])
    request = reference(case, model)
    plan = family_plan(model, request) if kind == "pruned" else dense_plan(model, base="", request=request)
    apply_plan(model, plan)
    # The fused kernel of the CPU is not counted; the same sums as matrix products are.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(**inputs, logits_to_keep=1, use_cache=False)
    counted = macs(model)
    assert counted["total"] == pytest.approx(counter.get_total_flops() / 2, rel=0.01)
    assert counted["total"] == counted["vision"] + counted["connector"] + counted["prefill"]
    assert request_of(model, plan) == request


@torch.no_grad()
@every_family
def test_macs_of_a_decoded_token(case: FamilyCase) -> None:
    model = pruned(case)
    inputs = case.inputs([0])
    cache = model(**inputs, use_cache=True).past_key_values
    mask = torch.cat([inputs["attention_mask"], inputs["attention_mask"].new_ones(1, 1)], 1)
    # The fused kernel of the CPU is not counted; the same sums as matrix products are.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(input_ids=torch.tensor([[20]]), attention_mask=mask, past_key_values=cache)
    assert macs(model)["decode_per_token"] == pytest.approx(counter.get_total_flops() / 2, rel=0.01)


@torch.no_grad()
@pytest.mark.parametrize(("heads", "kv_heads"), [(14, 2), (9, 3), (28, 4), (32, 8), (16, 2), (8, 1)])
def test_grouped_query_attention_in_both_ways(heads: int, kv_heads: int) -> None:
    """A head of every group in one layer, a whole group in another: masked equals shrunk, and the groups are right."""
    case = case_named("smolvlm")
    model = build(case, heads=heads, kv_heads=kv_heads, head_dim=4)
    plan, inputs = family_plan(model, reference(case, model)), case.inputs(3)
    masks = mask_units(model, plan)
    masked = model(**inputs).logits
    masks.detach()
    apply_plan(model, plan)
    assert (model(**inputs).logits - masked).abs().max() <= 1e-5
    first, _, last = (layer.attn for layer in active_schedule(model).streams["language"].layers)
    group = heads // kv_heads
    assert (first.heads, first.kv_heads) == (heads - kv_heads, kv_heads)
    assert (last.heads, last.kv_heads) == ((heads - group, kv_heads - 1) if kv_heads > 1 else (heads, 1))


@torch.no_grad()
def test_kept_tokens_of_qwen_keep_their_place_in_the_image() -> None:
    """M-RoPE: rows and columns of a kept token are those of the whole image, whatever else was dropped."""
    case = case_named("qwen2.5-vl")
    model = build(case)
    inputs = case.inputs([0])
    whole, _ = model.model.get_rope_index(
        inputs["input_ids"], mm_token_type_ids=inputs["mm_token_type_ids"], image_grid_thw=inputs["image_grid_thw"],
        attention_mask=inputs["attention_mask"],
    )  # fmt: skip
    plan = family_plan(model, reference(case, model), units=False)
    rest = (plan.streams["language"].tokens[0],) * 3
    attach(model, {**plan.schedules, "language": rest})
    seen = []
    model.model.language_model.rotary_emb.register_forward_pre_hook(lambda m, args: seen.append(args[1]))
    model(**inputs)
    kept = active_schedule(model).handed("vision")[0]
    start = int((inputs["input_ids"][0] == model.config.image_token_id).int().argmax())
    image = int((inputs["input_ids"][0] == model.config.image_token_id).sum())
    columns = [*range(start), *(start + kept).tolist(), *range(start + image, inputs["input_ids"].shape[1])]
    assert torch.equal(seen[0][:, 0], whole[:, 0, columns])


@torch.no_grad()
def test_a_norm_over_all_heads_keeps_them_together() -> None:
    case = case_named("internvl")
    model = build(case, qk_norm=True)
    request = reference(case, model)
    plan = family_plan(model, request)
    from comp_edge.errors import InputError

    with pytest.raises(InputError, match="3 of 4 heads in layer 0 of stream 'vision' cannot be kept.*keep all or none"):
        apply_plan(model, plan)
    dense = dense_plan(model, base="", request=request).streams["vision"].layers
    layers = tuple(
        kept.model_copy(update={"heads": whole.heads if kept.heads else ()})
        for kept, whole in zip(plan.streams["vision"].layers, dense, strict=True)
    )
    vision = plan.streams["vision"].model_copy(update={"layers": layers})
    plan = plan.model_copy(update={"streams": {**plan.streams, "vision": vision}})
    masks = mask_units(model, plan)
    inputs = case.inputs(2)
    masked = model(**inputs).logits
    masks.detach()
    apply_plan(model, plan)
    assert (model(**inputs).logits - masked).abs().max() <= 1e-5


@torch.no_grad()
@every_family
def test_a_copied_model_has_hooks_of_its_own(case: FamilyCase) -> None:
    model = pruned(case)
    inputs = case.inputs(2)
    twin = copy.deepcopy(model)
    expected = model(**inputs).logits
    active_schedule(model).detach()
    assert torch.equal(twin(**inputs).logits, expected)
    assert twin.generate(**case.generate_inputs(1), max_new_tokens=2).shape[1] > 2
    assert active_schedule(twin) is not None and active_schedule(model) is None


def test_videos_are_refused_where_image_tokens_are_dropped() -> None:
    model = pruned(case_named("qwen2.5-vl"))
    with pytest.raises(ValueError, match="takes images, not videos"):
        model(input_ids=torch.tensor([[20, 21]]), pixel_values_videos=torch.zeros(4, 96))


def test_settled_plans_fit(tmp_path: Path) -> None:
    """The helper of these tests makes plans that the model accepts for several images, too."""
    case = case_named("smolvlm")
    model = build(case)
    request = family_of(model).request(model, case.inputs([1], images_per_prompt=2))
    assert request.images == 2
    plan = settled(model, family_plan(model, request), request)
    apply_plan(model, plan)
    assert plan.images == 2 and '"images": 2' in plan.save(tmp_path / "plan.json").read_text()
