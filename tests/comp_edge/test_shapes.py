"""The released models' shapes: genuine sizes, and random weights in no more memory than the model itself."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from comp_edge.errors import InputError
from comp_edge.reference import shapes
from comp_edge.reference.shapes import SHAPES, build_random, random_model, shape_config
from comp_edge.structure import empty_model
from tests import families

# What the model cards and the safetensors indices of the hub say, in millions. BLIP's count the tied output matrix
# [30524, 768] of a decoder twice; transformers 5.23 ties it.
PUBLISHED = {
    "clip-vit-b-16": 149.6,
    "siglip-base-patch16-224": 203.2,
    "siglip2-base-patch16-naflex": 375.2,
    "blip-vqa-base": 384.7 - 23.4,
    "blip-itm-base-coco": 223.7,
    "blip-image-captioning-base": 247.4 - 23.4,
    "llava-1.5-7b-hf": 7063.4,
    "idefics3-8b-llama3": 8462.1,
    "smolvlm-256m": 256.5,
    "smolvlm-500m": 507.5,
    "smolvlm2-2.2b": 2246.8,
    "qwen2.5-vl-3b": 3754.6,
    "internvl3-1b": 938.2,
}
# Query and key-value heads of the language model, and how many tokens it sees of one tile.
LANGUAGE = {
    "llava-1.5-7b-hf": (32, 32, 576),
    "idefics3-8b-llama3": (32, 8, 169),
    "smolvlm-256m": (9, 3, 64),
    "smolvlm-500m": (15, 5, 64),
    "smolvlm2-2.2b": (32, 32, 81),
    "qwen2.5-vl-3b": (16, 2, None),
    "internvl3-1b": (14, 2, 256),
}


def test_every_shape_has_one_file():
    assert sorted(SHAPES) == sorted(path.stem for path in shapes.SHAPE_FOLDER.glob("*.json"))


@pytest.mark.parametrize("name", SHAPES)
def test_parameters_are_those_of_the_released_model(name):
    model = empty_model(shape_config(name))
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count == SHAPES[name].parameters
    assert count / 1e6 == pytest.approx(PUBLISHED[name], abs=0.1)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


@pytest.mark.parametrize("name", LANGUAGE)
def test_heads_and_image_tokens(name):
    config = shape_config(name)
    heads, groups, tokens = LANGUAGE[name]
    assert (config.text_config.num_attention_heads, config.text_config.num_key_value_heads) == (heads, groups)
    if hasattr(config, "scale_factor"):
        assert (
            config.vision_config.image_size // config.vision_config.patch_size
        ) ** 2 // config.scale_factor**2 == tokens
    elif tokens:
        assert config.image_seq_length == tokens


@pytest.mark.parametrize("name", SHAPES)
def test_token_ids_lie_within_the_vocabulary(name):
    config = shape_config(name)
    text = config.text_config
    ids = [text.pad_token_id, getattr(config, "image_token_id", None), getattr(config, "video_token_id", None)]
    ids += text.eos_token_id if isinstance(text.eos_token_id, list) else [text.eos_token_id]
    ids += [text.bos_token_id]
    assert all(0 <= token < text.vocab_size for token in ids if token is not None)


def test_unknown_names_are_refused_with_the_known_ones():
    with pytest.raises(InputError, match="'smolvlm-1b'.*smolvlm-256m.*qwen2.5-vl-3b"):
        build_random("smolvlm-1b")


def small_config(case: families.FamilyCase) -> Any:
    model = case.model()
    model.config.architectures = [type(model).__name__]
    return model.config


@pytest.mark.parametrize("case", families.CASES, ids=str)
def test_random_models_are_whole(case):
    config = small_config(case)
    model = random_model(config, dtype=torch.bfloat16)
    usual = case.model()  # as transformers itself builds it
    state, expected = model.state_dict(), usual.state_dict()
    assert {name: tensor.shape for name, tensor in state.items()} == {n: t.shape for n, t in expected.items()}
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert len(list(model.parameters())) == len(list(usual.parameters()))  # what is tied is tied
    assert not model.training
    buffers = dict(model.named_buffers())
    for name, buffer in usual.named_buffers():
        assert torch.equal(buffers[name], buffer), name  # not in bfloat16, either
    outputs = case.outputs(model, case.inputs(2))
    assert all(torch.isfinite(row).all() for row in outputs)
    assert not torch.allclose(outputs[0][-1], outputs[1][-1])


def test_the_seed_decides():
    config = small_config(families.case_named("smolvlm"))
    first, again, other = (random_model(config, seed=seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_the_configuration_given_is_left_as_it_was():
    config = small_config(families.case_named("qwen2.5-vl"))
    before = config.to_dict()
    random_model(config, dtype=torch.bfloat16)
    assert config.to_dict() == before


@pytest.mark.slow
def test_weights_are_never_held_twice():
    program = """
import torch, transformers
from comp_edge.reference.shapes import build_random, shape_config
from comp_edge.structure import empty_model
peak = lambda: int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) * 1024
empty_model(shape_config("smolvlm-500m"))  # imports and the like
before = peak()
model = build_random("smolvlm-500m", dtype=torch.bfloat16)
weights = sum(parameter.nbytes for parameter in model.parameters())
print((peak() - before) / weights)
"""
    root = Path(__file__).resolve().parents[2]
    ran = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=True)
    assert float(ran.stdout) < 1.1


@pytest.mark.slow
@pytest.mark.parametrize("name, inputs", [("clip-vit-b-16", 224), ("smolvlm-256m", 512)])
def test_forward_at_true_size(name, inputs):
    model = build_random(name)
    pixels = torch.rand(1, 3, inputs, inputs) * 2 - 1
    if name == "clip-vit-b-16":
        ids = torch.tensor([[49406, 320, 1125, 49407]])
        output = model(input_ids=ids, pixel_values=pixels).image_embeds
    else:
        ids = torch.tensor([[1, 49189, 49152, *[49190] * 64, 49189, 198, 354]])
        output = model(input_ids=ids, pixel_values=pixels[None]).logits
    assert torch.isfinite(output).all()
