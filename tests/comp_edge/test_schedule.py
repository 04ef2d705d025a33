"""A scheduled model is an ordinary transformers model: forward, labels, padding, caches and generate agree."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import StaticCache

from comp_edge.plan import Plan
from comp_edge.schedule import active_schedule, attach, drops_tokens
from comp_edge.surgery import apply_plan
from tests.comp_edge.plans import tiny_plan


@pytest.fixture
def setting(tiny_model: Any, tiny_task: Any) -> tuple[Any, Any, Plan, dict[str, torch.Tensor]]:
    plan = tiny_plan(prompt=tiny_task.prompt_length - 16)
    apply_plan(tiny_model, plan)
    return tiny_model, tiny_task, plan, tiny_task.batch("val", list(range(12)))


def prompt_of(batch: dict[str, torch.Tensor], length: int) -> dict[str, torch.Tensor]:
    return {
        "input_ids": batch["input_ids"][:, :length],
        "attention_mask": batch["attention_mask"][:, :length],
        "pixel_values": batch["pixel_values"],
    }


def row(inputs: dict[str, torch.Tensor], i: int) -> dict[str, torch.Tensor]:
    return {name: value[i : i + 1] for name, value in inputs.items()}


@torch.no_grad()
def test_layers_compute_on_the_tokens_of_the_plan(setting: Any) -> None:
    model, task, plan, batch = setting
    seen: dict[str, list[int]] = {"vision": [], "language": []}
    for name, stream in active_schedule(model).streams.items():
        for layer in stream.layers:
            layer.norm_mlp.register_forward_hook(lambda m, args, out, name=name: seen[name].append(args[0].shape[1]))
    model(**prompt_of(batch, task.prompt_length))
    assert seen == {name: list(stream.tokens) for name, stream in plan.streams.items()}


@torch.no_grad()
def test_logits_have_one_position_per_given_token(setting: Any) -> None:
    model, task, _, batch = setting
    inputs = prompt_of(batch, task.prompt_length)
    assert model(**inputs).logits.shape[:2] == inputs["input_ids"].shape


@torch.no_grad()
def test_examples_do_not_depend_on_their_batch(setting: Any) -> None:
    model, task, _, batch = setting
    inputs = prompt_of(batch, task.prompt_length)
    together = model(**inputs).logits[:, -1]
    for i in range(len(together)):
        assert torch.allclose(model(**row(inputs, i)).logits[0, -1], together[i], atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("extra", [0, 3])
def test_padding_changes_nothing(setting: Any, extra: int) -> None:
    """Without padding, padded to the reference length, and padded beyond it."""
    model, task, _, batch = setting
    inputs = prompt_of(batch, task.prompt_length)
    padding = torch.zeros(len(inputs["input_ids"]), extra, dtype=torch.long)
    padded = {
        "input_ids": torch.cat([padding, inputs["input_ids"]], 1),
        "attention_mask": torch.cat([padding, inputs["attention_mask"]], 1),
        "pixel_values": inputs["pixel_values"],
    }
    together = model(**padded).logits[:, -1]
    for i in range(len(together)):
        one = row(inputs, i)
        real = one["attention_mask"][0] > 0
        bare = {
            "input_ids": one["input_ids"][:, real],
            "attention_mask": one["attention_mask"][:, real],
            "pixel_values": one["pixel_values"],
        }
        assert torch.allclose(model(**bare).logits[0, -1], together[i], atol=1e-5)


@torch.no_grad()
def test_labelled_answers_see_what_decoding_sees(setting: Any) -> None:
    """Teacher forcing in one pass equals prefill and decode with the per-layer cache."""
    model, task, _, batch = setting
    length = task.prompt_length
    whole = model(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        pixel_values=batch["pixel_values"],
        labels=batch["labels"],
    ).logits
    prefill = model(**prompt_of(batch, length), use_cache=True)
    mask = batch["attention_mask"][:, : length + 1]
    decoded = model(
        input_ids=batch["input_ids"][:, length : length + 1],
        attention_mask=mask,
        position_ids=(mask.cumsum(1) - 1)[:, -1:],
        past_key_values=prefill.past_key_values,
    )
    assert torch.allclose(whole[:, length - 1], prefill.logits[:, -1], atol=1e-5)
    assert torch.allclose(whole[:, length], decoded.logits[:, -1], atol=1e-5)


@torch.no_grad()
def test_cache_layers_have_the_lengths_of_the_plan(setting: Any) -> None:
    model, task, plan, batch = setting
    cache = model(**prompt_of(batch, task.prompt_length), use_cache=True).past_key_values
    lengths = [None if layer.keys is None else layer.keys.shape[2] for layer in cache.layers]
    tokens = plan.streams["language"].tokens
    assert lengths == [tokens[0], None, tokens[2]]  # the second layer's attention was pruned away


@torch.no_grad()
@pytest.mark.parametrize("rows", [slice(0, 12), slice(2, 3)], ids=["padded batch", "alone"])
def test_generate_equals_teacher_forcing_token_for_token(setting: Any, rows: slice) -> None:
    model, task, _, batch = setting
    inputs = {name: value[rows] for name, value in prompt_of(batch, task.prompt_length).items()}
    if len(inputs["input_ids"]) == 1:  # without padding generate passes no mask at all
        real = inputs["attention_mask"][0] > 0
        inputs |= {name: inputs[name][:, real] for name in ("input_ids", "attention_mask")}
    length = inputs["input_ids"].shape[1]
    generated = model.generate(**inputs, max_new_tokens=5, min_new_tokens=5, do_sample=False)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    for step in range(5):
        labels = torch.full_like(ids, -100)
        labels[:, length:] = 1
        logits = model(
            input_ids=ids,
            attention_mask=mask,
            pixel_values=inputs["pixel_values"],
            labels=labels if step else None,
        ).logits[:, -1]
        logits[:, model.generation_config.eos_token_id] = -torch.inf  # as min_new_tokens does
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
    assert torch.equal(ids, generated)


@torch.no_grad()
def test_beam_search_reorders_the_scheduled_cache(setting: Any) -> None:
    """Beams of one example must not read another's cache: a batch gives what its examples give alone."""
    model, task, _, batch = setting
    inputs = prompt_of(batch, task.prompt_length)
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "num_beams": 3, "do_sample": False}
    together = model.generate(**inputs, **options)
    for i in (0, 5, 11):
        assert torch.equal(model.generate(**row(inputs, i), **options)[0], together[i])


@torch.no_grad()
def test_compact_and_full_placeholders_are_the_same_prompt(setting: Any) -> None:
    model, task, plan, batch = setting
    inputs = prompt_of(batch, task.prompt_length)
    delivered = plan.streams["vision"].tokens[-1] - 1
    one = row(inputs, 0)
    image = (one["input_ids"][0] == model.config.image_token_id).nonzero()[:, 0]
    keep = torch.ones(one["input_ids"].shape[1], dtype=torch.bool)
    keep[image[delivered:]] = False
    compact = {
        "input_ids": one["input_ids"][:, keep],
        "attention_mask": one["attention_mask"][:, keep],
        "pixel_values": one["pixel_values"],
    }
    assert torch.allclose(model(**compact).logits[0, -1], model(**one).logits[0, -1], atol=1e-5)
    full, short = (model.generate(**x, max_new_tokens=4, do_sample=False) for x in (one, compact))
    assert torch.equal(full[0, one["input_ids"].shape[1] :], short[0, compact["input_ids"].shape[1] :])


@torch.no_grad()
def test_shared_prefix_is_exact_while_the_language_model_drops_nothing(tiny_model: Any, tiny_task: Any) -> None:
    prompt = tiny_task.prompt_length - 16
    plan = tiny_plan(prompt=prompt, language_drops=(8 + prompt, 8 + prompt))
    apply_plan(tiny_model, plan)
    assert drops_tokens(tiny_model, "vision") and not drops_tokens(tiny_model, "language")
    batch = tiny_task.batch("val", list(range(12)))
    shared = tiny_task.logits(tiny_model, batch)
    whole = tiny_model(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        pixel_values=batch["pixel_values"],
        labels=batch["labels"],
    ).logits[:, tiny_task.prompt_length - 1 : -1]
    answered = tiny_task.targets(batch) != -100
    assert torch.allclose(shared[answered], whole[answered], atol=1e-5)


@torch.no_grad()
def test_detaching_gives_the_dense_model_back(tiny_model: Any, tiny_task: Any) -> None:
    inputs = prompt_of(tiny_task.batch("val", [0, 1, 2]), tiny_task.prompt_length)
    before = tiny_model(**inputs).logits
    n = inputs["input_ids"].shape[1]
    attach(tiny_model, {"vision": (17, 9, 9), "language": (n - 8, n - 12, n - 14)})
    assert not torch.allclose(tiny_model(**inputs).logits[:, -1], before[:, -1])
    active_schedule(tiny_model).detach()
    real = inputs["attention_mask"] > 0
    assert torch.allclose(tiny_model(**inputs).logits[real], before[real], atol=1e-5)


def test_gradients_flow_through_kept_tokens(setting: Any) -> None:
    model, task, _, batch = setting
    task.loss(model, batch).backward()
    without = {name for name, p in model.named_parameters() if p.grad is None}
    # Only the norms before what was pruned away, and CLIP's pooling norm that LLaVA never uses, have nothing to learn.
    assert all("norm" in name for name in without)
    assert not any(
        "post_layernorm" not in n and "layers.2.layer_norm2" not in n and "layers.1.input" not in n for n in without
    )


@torch.no_grad()
def test_a_cache_of_fixed_length_is_refused(setting: Any) -> None:
    model, task, _, batch = setting
    inputs = prompt_of(batch, task.prompt_length)
    with pytest.raises(ValueError, match="needs a DynamicCache.*StaticCache"):
        model(**inputs, past_key_values=StaticCache(config=model.config, max_cache_len=64))
