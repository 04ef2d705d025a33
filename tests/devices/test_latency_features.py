"""What features count, against what the exported modules do."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from comp_edge.families import family_of
from comp_edge.families.base import Request
from comp_edge.plan import LayerPlan
from comp_edge.reference.shapes import shape_config
from comp_edge.structure import empty_model
from comp_edge.surgery import apply_plan
from comp_edge.units import dense_plan
from devices.depth import with_layers
from devices.errors import DeviceError
from devices.latency.features import FEATURES, MACS, rows
from devices.latency.program import Program
from devices.profiles import ModelRecord
from export.encoder_methods import Shape, parts_of
from export.graph import EXECUTORCH, Decode, LanguageModel, Prefill, VisionEncoder
from export.source import Source
from tests.comp_edge.plans import family_plan
from tests.devices.latency_machine import clip_config, llava_config
from tests.families import CASES, CLIP_EOS, case_named

ROOM = 5
WIDE = {"vision_heads": 8, "vision_head_dim": 16, "heads": 8, "head_dim": 16, "ffn": 512, "vision_ffn": 512}
COUNTED = [list(FEATURES).index(name) for name in MACS]


def value(vectors: dict[str, np.ndarray], method: str, feature: str) -> float:
    return float(vectors[method][list(FEATURES).index(feature)])


def request_of(model: Any) -> Request:
    family = family_of(model)
    # Qwen's usual image has 12,544 patches of the test's size.
    return Request(64, 12) if family.model_type == "qwen2_5_vl" else family.default_request(model, 12)


def modules(case: Any, model: Any, plan: Any) -> dict[str, tuple[torch.nn.Module, tuple]]:
    """The methods as they are exported, with inputs."""
    vision = model.config.vision_config
    family = family_of(model)
    side = getattr(vision, "image_size", None)
    side = side[0] if isinstance(side, list | tuple) else side
    if family.variable_images:
        side = round(plan.streams["vision"].tokens[0] ** 0.5) * vision.patch_size
    if family.fusion(model) is None:
        eos = CLIP_EOS if case.name == "clip" else 2
        parts = parts_of(model, Shape(plan.schedules, (side, side), 0, eos, ROOM), EXECUTORCH)
        return {name: (part.module, part.example()) for name, part in parts.items()}
    source = Source(model=model, plan=plan, processor=None, template="", new_tokens=ROOM, size=(side, side))
    tokens = source.tokens["language"]
    language = LanguageModel(model, tokens, new_tokens=ROOM, options=EXECUTORCH, grid=source.grid)
    prompt = (torch.zeros(1, tokens[0], model.config.text_config.hidden_size), torch.tensor([1]))
    if source.grid is not None:
        prompt = (*prompt, torch.zeros(3, tokens[0], dtype=torch.int64))
    return {
        "vision_encoder": (
            VisionEncoder(model, source.tokens["vision"], EXECUTORCH, size=(side, side)),
            (torch.zeros(1, 3, side, side),),
        ),
        "prefill": (Prefill(language), prompt),
        "decode": (Decode(language), (torch.tensor([[0]]), torch.tensor([tokens[0]]), torch.tensor([1]))),
    }


@pytest.mark.parametrize("kind", ["dense", "pruned"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_macs_are_what_the_exported_modules_do(case, kind):
    """Within 2 %: means of norms, rotations by position and the ranking of tokens are products, too, but not counted."""
    model = case.model(seed=0, kv_heads=4 if case.grouped else 8, vision_layers=4, **WIDE)
    request = request_of(model)
    plan = dense_plan(model, base="", request=request) if kind == "dense" else family_plan(model, request)
    vectors = Program(model, room=ROOM).vectors(plan)
    apply_plan(model, plan)
    found = modules(case, model, plan)
    assert set(found) == set(vectors)
    for name, (module, inputs) in found.items():
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            module(*inputs)
        assert vectors[name][COUNTED].sum() * 1e6 == pytest.approx(counter.get_total_flops() / 2, rel=0.02), name


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_program_of_fewer_layers_is_that_of_the_first(case):
    """Features of a block come from the dense model's program: the same as from a program of the shallow model."""
    model = case.model(seed=0, vision_layers=4, language_layers=4, full_layers=(1, 3))
    model.config.architectures = [type(model).__name__]
    shallow = empty_model(with_layers(model.config, {"vision": 2, "language": 3}))
    plan = dense_plan(shallow, base="", request=request_of(shallow))
    expected = Program(shallow, room=ROOM).vectors(plan)
    program = Program(model, room=ROOM)
    found = program.vectors(plan)
    assert found.keys() == expected.keys()
    for name, vector in expected.items():
        assert found[name] == pytest.approx(vector, rel=1e-9), name
    program.check(plan, whole=False)
    with pytest.raises(DeviceError, match="the plan has 2 layers in stream 'vision'; the measured model has [34]"):
        program.check(plan)


def test_rows():
    """Tokens that come in, that leave attention, and before a drop; behind the last attention one token goes on."""
    tokens, every = (10, 8, 8, 5), (True,) * 4
    assert rows(tokens, every, "all") == ((10, 10, 0), (8, 8, 10), (8, 8, 0), (5, 5, 8))
    assert rows(tokens, every, "one") == ((10, 10, 0), (8, 8, 10), (8, 8, 0), (5, 1, 8))
    early = (True, True, False, False)
    assert rows(tokens, early, "one") == ((10, 10, 0), (8, 1, 10), (1, 1, 0), (1, 1, 0))
    # The tower's drop before layer 3 counts on all tokens, although only the class token is read.
    assert rows(tokens, early, "class") == ((10, 10, 0), (8, 8, 10), (8, 8, 0), (5, 1, 8))
    assert rows((10, 8, 8, 8), early, "class") == ((10, 10, 0), (8, 1, 10), (1, 1, 0), (1, 1, 0))
    assert rows(tokens, (False,) * 4, "one") == ((1, 1, 0),) * 4
    assert rows(tokens, every, "all", step=4) == ((12, 12, 0), (8, 8, 12), (8, 8, 0), (8, 8, 8))


def test_decode_counts_its_caches():
    """A token attends to what its layer kept and to the room for the answer, all of which is blended."""
    model = empty_model(llava_config())
    program = Program(model, room=16)
    plan = dense_plan(model, base="", prompt_tokens=24)
    less = plan.with_tokens("language", (88, 40, 40, 40))
    found, fewer = program.vectors(plan), program.vectors(less)
    assert value(found, "decode", "cache") == pytest.approx(4 * (88 + 16) * 2 * 3 * 16 * 1e-6)
    assert value(fewer, "decode", "cache") == pytest.approx((88 + 3 * 40 + 4 * 16) * 2 * 3 * 16 * 1e-6)
    assert value(fewer, "decode", "products") < value(found, "decode", "products")
    assert value(fewer, "decode", "drops") == 0 and value(fewer, "prefill", "drops") == 1
    # One token's products are its weights.
    assert value(found, "decode", "ffn") + value(found, "decode", "projections") == pytest.approx(
        value(found, "decode", "weights")
    )
    assert program.calls(plan, 7) == {"vision_encoder": 1, "prefill": 1, "decode": 7}


def test_steps_round_tokens_up():
    model = empty_model(clip_config())
    program = Program(model, room=16).with_step(64)
    plan = dense_plan(model, base="", prompt_tokens=20)
    vectors = {n: program.vectors(plan.with_tokens("vision", (197, *(n,) * 5))) for n in (129, 150, 192, 128)}
    assert vectors[150]["image_encoder"] == pytest.approx(vectors[192]["image_encoder"])
    assert vectors[129]["image_encoder"] == pytest.approx(vectors[192]["image_encoder"])
    assert value(vectors[128], "image_encoder", "ffn") < value(vectors[129], "image_encoder", "ffn")


def test_a_drop_behind_the_connector_is_a_layer_behind_the_last():
    model = empty_model(shape_config("smolvlm-256m"))
    program, plan = Program(model, room=16), dense_plan(model, base="", prompt_tokens=32)
    dropped = plan.with_tokens("vision", (*plan.streams["vision"].tokens, 40)).with_tokens("language", (72,) * 30)
    assert value(program.vectors(plan), "vision_encoder", "drops") == 0
    assert value(program.vectors(dropped), "vision_encoder", "drops") == 1
    counts = [len(program.steps(layers)) for layers in program.layers_of(dropped)]
    assert counts == [13, 30, 30]


def test_an_answer_begins_with_a_decode():
    model = case_named("blip-vqa").model(seed=0)
    program, plan = Program(model, room=8), dense_plan(model, base="", prompt_tokens=12)
    assert program.calls(plan, 0) == {"vision_encoder": 1, "prefill": 1, "decode": 1}
    retrieval = case_named("blip-retrieval").model(seed=0)
    assert Program(retrieval, room=8).calls(plan, 3) == {"vision_encoder": 1, "matcher": 1}


# ---- what does not fit


def record(**changes: Any) -> ModelRecord:
    config = llava_config()
    values = {"name": "m", "model_type": "llava", "config": config.to_dict(), "text_tokens": 24, "new_tokens": 16}
    return ModelRecord.model_validate(values | changes)


def edited(path: tuple[str, ...], new: Any) -> dict[str, Any]:
    config = copy.deepcopy(llava_config().to_dict())
    part = config
    for key in path[:-1]:
        part = part[key]
    part[path[-1]] = new
    return config


def test_a_record_gives_the_program_of_its_model():
    program = Program.of(record())
    assert program.layers == {"vision": 6, "language": 4} and program.room == 16
    assert program.methods == ("vision_encoder", "prefill", "decode")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"config": {}}, "model type None"),
        ({"config": {"model_type": "bert"}}, "cannot be used: model type 'bert' is not supported"),
        ({"model_type": "clip"}, "is said to be 'clip'; its config is of 'llava'"),
        (
            {"config": edited(("text_config", "num_hidden_layers"), 10**9)},
            "num_hidden_layers 1000000000; accepted: 1 to",
        ),
        ({"config": edited(("vision_config", "image_size"), 10**9)}, "image_size 1000000000; accepted: 1 to"),
        ({"config": edited(("vision_config", "num_hidden_layers"), -3)}, "num_hidden_layers -3; accepted: 1 to"),
        ({"config": edited(("text_config", "num_attention_heads"), "six")}, "cannot be used"),
        ({"config": edited(("vision_config", "patch_size"), 0)}, "cannot be used"),
        ({"config": edited(("architectures",), ["Nothing"])}, "cannot be used: architecture 'Nothing'"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_records_that_are_no_model(changes, message):
    with pytest.raises(DeviceError, match=message):
        Program.of(record(**changes))


def test_plans_that_are_not_of_the_model():
    program = Program.of(record())
    clip = dense_plan(empty_model(shape_config("clip-vit-b-16")), base="", prompt_tokens=20)
    with pytest.raises(DeviceError, match="the plan has 12 layers in stream 'vision'; the measured model has 6"):
        program.check(clip)
    blip = dense_plan(case_named("blip-vqa").model(seed=0), base="", prompt_tokens=12)
    with pytest.raises(DeviceError, match=r"streams \['cross', 'language', 'vision'\]"):
        program.check(blip)
    plan = dense_plan(empty_model(llava_config()), base="", prompt_tokens=24)
    for layer, message in (
        (LayerPlan(heads=(6,), ffn=()), "head 6 and 0 channels in a layer of stream 'language'.*6 heads"),
        (LayerPlan(heads=(), ffn=tuple(range(300))), "300 channels in a layer of stream 'language'.*256"),
        (LayerPlan(heads=(0, 1, 2), ffn=()), "stream 'language'.*same number"),
    ):
        stream = plan.streams["language"]
        wrong = stream.model_copy(update={"layers": (layer, *stream.layers[1:])})
        with pytest.raises(DeviceError, match=message):
            program.vectors(plan.model_copy(update={"streams": plan.streams | {"language": wrong}}))
