"""Counted multiply-accumulates against what torch counts while the shrunk model runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from comp_edge.cost import Cost, MacsCost, macs
from comp_edge.plan import Plan, StreamPlan
from comp_edge.surgery import apply_plan
from comp_edge.units import dense_plan

PROMPT = 8


def change(plan: Plan, stream: str, *, tokens: tuple[int, ...], layers: dict[int, dict[str, Any]]) -> Plan:
    old = plan.streams[stream].layers
    new = tuple(layer.model_copy(update=layers.get(i, {})) for i, layer in enumerate(old))
    return plan.model_copy(update={"streams": plan.streams | {stream: StreamPlan(layers=new, tokens=tokens)}})


def plan_of(model: Any, kind: str) -> Plan:
    plan = dense_plan(model, prompt_tokens=PROMPT, base="tiny")
    dense = {name: stream.tokens for name, stream in plan.streams.items()}
    vision, language = (dense["vision"], dense["language"])
    vision_layers: dict[int, dict] = {}
    language_layers: dict[int, dict] = {}
    if kind in ("tokens", "everything"):
        vision, language = (17, 12, 9), (16, 11, 6)
    if kind in ("parameters", "everything"):
        vision_layers = {0: {"heads": (0, 2)}, 1: {"ffn": tuple(range(0, 64, 4))}, 2: {"heads": ()}}
        language_layers = {0: {"heads": (1, 2)}, 1: {"heads": (2, 3), "ffn": ()}, 2: {"ffn": tuple(range(40))}}
    plan = change(plan, "vision", tokens=vision, layers=vision_layers)
    return change(plan, "language", tokens=language, layers=language_layers)


def counted(run: Any) -> float:
    """MACs that torch saw. The flop counter counts two per multiply-accumulate; the plain kernel makes attention's
    matrix products visible to it one by one."""
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops() / 2


@pytest.fixture(scope="module")
def request_inputs(tiny_task: Any) -> dict[str, torch.Tensor]:
    """One image with a prompt of exactly the reference length: nothing is padding."""
    batch = next(iter(tiny_task.val_batches()))
    length = tiny_task.prompt_length
    row = int(batch["attention_mask"][:, :length].all(1).int().argmax())
    inputs = {name: batch[name][row : row + 1] for name in ("input_ids", "attention_mask", "pixel_values")}
    inputs = {name: value if name == "pixel_values" else value[:, :length] for name, value in inputs.items()}
    assert length == 16 + PROMPT and bool(inputs["attention_mask"].all())
    return inputs


@pytest.mark.parametrize("kind", ["dense", "tokens", "parameters", "everything"])
def test_macs_are_what_the_shrunk_model_does(make_model, request_inputs, kind):
    model = make_model()
    plan = plan_of(model, kind)
    predicted = MacsCost(model).parts(plan)
    apply_plan(model, plan)
    inputs = request_inputs
    total = counted(lambda: model(**inputs, logits_to_keep=1))
    assert predicted["total"] == pytest.approx(total, rel=0.01)
    vision = counted(lambda: model.model.vision_tower(pixel_values=inputs["pixel_values"]))
    assert predicted["vision"] == pytest.approx(vision, rel=0.01)
    features = torch.randn(1, plan.streams["vision"].tokens[-1] - 1, 32)
    connector = counted(lambda: model.model.multi_modal_projector(features))
    assert predicted["connector"] == pytest.approx(connector, rel=1e-6)


@pytest.mark.parametrize("kind", ["dense", "tokens", "parameters", "everything"])
def test_macs_of_a_decoded_token(make_model, request_inputs, kind):
    model = make_model()
    plan = plan_of(model, kind)
    predicted = MacsCost(model).parts(plan)["decode_per_token"]
    apply_plan(model, plan)
    with torch.no_grad():
        cache = model(**request_inputs, use_cache=True).past_key_values
    ids, positions = torch.tensor([[50]]), torch.tensor([[cache.get_seq_length()]])
    total = counted(lambda: model(input_ids=ids, position_ids=positions, past_key_values=cache, use_cache=True))
    assert predicted == pytest.approx(total, rel=0.01)


def test_decoded_tokens_in_the_total(make_model):
    model = make_model()
    plan = plan_of(model, "everything")
    first, more = MacsCost(model).parts(plan), MacsCost(model, decode_tokens=3).parts(plan)
    attention = 2 * sum(len(layer.heads) * 8 for layer in plan.streams["language"].layers)
    # Each decoded token attends to one more than the one before.
    assert more["total"] - first["total"] == 3 * first["decode_per_token"] + (1 + 2) * attention
    assert first["total"] == sum(first[part] for part in ("vision", "language", "connector", "head"))


def test_a_plan_counts_alike_from_dense_and_pruned_models(make_model):
    model = make_model()
    plan = plan_of(model, "everything")
    before = macs(model, plan)
    dense = macs(model, prompt_tokens=PROMPT)
    assert dense == macs(model, plan_of(model, "dense"))
    assert before["total"] < dense["total"]
    apply_plan(model, plan)
    assert macs(model) == macs(model, plan) == before
    assert macs(model, plan_of(make_model(), "dense")) == dense


def test_every_removal_saves(make_model):
    model = make_model()
    cost = MacsCost(model)
    assert isinstance(cost, Cost) and cost.name == "macs"
    plan = plan_of(model, "dense")
    dense = cost.predict(plan)
    for stream in ("vision", "language"):
        full = plan.streams[stream].tokens
        for layer in range(3):
            for removal in ({"heads": (0, 1)}, {"heads": ()}, {"ffn": tuple(range(63))}, {"ffn": ()}):
                assert cost.predict(change(plan, stream, tokens=full, layers={layer: removal})) < dense
            if layer:
                fewer = full[:layer] + tuple(n - 1 for n in full[layer:])
                assert cost.predict(change(plan, stream, tokens=fewer, layers={})) < dense


def test_key_value_heads_are_counted_once_a_group(make_model):
    """A head of each group frees no key-value head, a whole group does."""
    model = make_model()
    plan, cost = plan_of(model, "dense"), MacsCost(model)
    tokens = plan.streams["language"].tokens
    thin = cost.predict(change(plan, "language", tokens=tokens, layers={0: {"heads": (0, 2)}}))
    whole = cost.predict(change(plan, "language", tokens=tokens, layers={0: {"heads": (0, 1)}}))
    assert thin - whole == tokens[0] * 32 * 2 * 8  # k and v of one head


def test_unused_vision_layers_cost_nothing(make_model):
    last, before = (macs(make_model(feature_layer=layer), prompt_tokens=PROMPT) for layer in (-1, -2))
    shallow = macs(make_model(vision_layers=2), prompt_tokens=PROMPT)
    assert before == shallow and before["vision"] < last["vision"]
