"""Processors of every family: their ids agree with the configuration, they survive saving, and models take what they give."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from transformers.utils import is_torchvision_available

from comp_edge.errors import InputError
from comp_edge.reference.processors import IMAGES_ONLY, PLACEHOLDERS, auto_processor, build_processor, config_for
from tests import families, tiny

QUESTIONS = ["What digit is red?", "How many digits are there?"]
EXPECTED = {
    "clip": "CLIPProcessor",
    "siglip": "SiglipProcessor",
    "siglip2": "Siglip2Processor",
    "blip": "BlipProcessor",
    "llava": "LlavaProcessor",
    "idefics3": "Idefics3Processor",
    "smolvlm": "Idefics3Processor",
    "qwen2_5_vl": "Qwen2_5_VLImages",
    "internvl": "InternVLImages",
}


@pytest.fixture(scope="module")
def corpus() -> list[str]:
    return tiny.corpus()


@pytest.fixture(scope="module", params=families.CASES, ids=str)
def family(request: pytest.FixtureRequest, corpus: list[str]) -> tuple[families.FamilyCase, Any, Any]:
    """(case, processor, model of the configuration that agrees with it)"""
    model = request.param.model()
    processor = build_processor(model.config.model_type, model.config, corpus)
    config = config_for(processor, model.config)
    return request.param, processor, type(model)(config).eval()


def picture(height: int, width: int, seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def process(processor: Any, pictures: list[Image.Image]) -> dict[str, torch.Tensor]:
    """Both questions, each about its own picture, through the chat template where there is one."""
    options: dict[str, Any] = {"return_tensors": "pt", "padding": True}
    if getattr(processor, "chat_template", None) is None:
        if "iglip" in type(processor).__name__:
            options |= {"padding": "max_length", "truncation": True, "max_length": families.SIGLIP_TEXT}
        return dict(processor(images=pictures, text=QUESTIONS, **options))
    conversations = [
        [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": question}]}]
        for image, question in zip(pictures, QUESTIONS, strict=True)
    ]
    return dict(
        processor.apply_chat_template(
            conversations, add_generation_prompt=True, tokenize=True, return_dict=True, **options
        )
    )


def test_the_family_s_own_class(family):
    case, processor, model = family
    assert type(processor).__name__ == EXPECTED[model.config.model_type]


def test_token_ids_agree(family):
    case, processor, model = family
    tokenizer, config = processor.tokenizer, model.config
    text = config.text_config
    assert text.pad_token_id == tokenizer.pad_token_id is not None
    assert text.bos_token_id == tokenizer.bos_token_id
    assert text.vocab_size >= len(tokenizer)
    assert max(tokenizer.get_vocab().values()) == len(tokenizer) - 1
    if case.name.startswith("blip"):
        assert text.sep_token_id == tokenizer.sep_token_id
        assert tokenizer.convert_ids_to_tokens(text.bos_token_id) == "[DEC]"
    else:
        assert text.eos_token_id == tokenizer.eos_token_id is not None
    for attribute, token in PLACEHOLDERS.get(config.model_type, {}).items():
        assert tokenizer.encode(f"a{token}b", add_special_tokens=False).count(getattr(config, attribute)) == 1
    if config.model_type in PLACEHOLDERS:
        assert processor.image_token_id == config.image_token_id


def test_a_model_takes_what_it_gives(family):
    case, processor, model = family
    inputs = process(processor, [picture(100, 80, 0), picture(50, 120, 1)])
    layout = case.inputs(2)
    if case.name == "blip-vqa":
        inputs["labels"] = inputs["input_ids"][:, :3]
    assert inputs.keys() == layout.keys()
    for name, tensor in inputs.items():
        assert (tensor.dtype, tensor.ndim) == (layout[name].dtype, layout[name].ndim), name
    with torch.no_grad():
        outputs = case.outputs(model, inputs)
    assert all(torch.isfinite(row).all() for row in outputs)


def test_saved_and_found_by_auto_processor(family, tmp_path):
    _, processor, model = family
    model.config.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded = transformers.AutoProcessor.from_pretrained(tmp_path)
    assert type(loaded) is type(processor)
    pictures = [picture(100, 80, 0), picture(50, 120, 1)]
    before, after = process(processor, pictures), process(loaded, pictures)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert loaded.tokenizer.decode(before["input_ids"][0]) == processor.tokenizer.decode(before["input_ids"][0])


def test_text_comes_back(family):
    case, processor, _ = family
    tokenizer = processor.tokenizer
    back = tokenizer.decode(tokenizer("what digit is red")["input_ids"], skip_special_tokens=True)
    if case.name == "siglip":  # the pieces of a unigram model are joined by the caller
        back = back.replace(" ", "").replace("▁", " ")
    assert back.strip() == "what digit is red"


def test_clip_closes_with_the_last_entry(corpus):
    """transformers finds the end of a text as its largest id where a configuration has OpenAI's own `eos_token_id`."""
    config = families.case_named("clip").model().config
    tokenizer = build_processor("clip", config, corpus).tokenizer
    ids = tokenizer("Zürich, 7!")["input_ids"]
    assert ids[0] == len(tokenizer) - 2 and ids[-1] == len(tokenizer) - 1
    assert len(tokenizer) - 1 not in ids[:-1]  # nothing is unknown


def test_the_vocabulary_of_a_true_shape_is_kept(corpus):
    from comp_edge.reference.shapes import shape_config

    config = shape_config("smolvlm-256m")
    agreed = config_for(build_processor("idefics3", config, corpus), config)
    assert agreed.text_config.vocab_size == 49280
    assert agreed.image_token_id < 512 and config.image_token_id == 49190


@pytest.mark.skipif(is_torchvision_available(), reason="transformers makes the full processor then")
@pytest.mark.parametrize("name", ["qwen2.5-vl", "internvl"])
def test_folders_that_name_the_class_are_read_without_torchvision(name, corpus, tmp_path):
    config = families.case_named(name).model().config
    processor = build_processor(config.model_type, config, corpus)
    config_for(processor, config).save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    file = tmp_path / "processor_config.json"
    settings = json.loads(file.read_text())
    assert settings["video_processor"]["video_processor_type"]
    full = IMAGES_ONLY[config.model_type].__mro__[2].__name__
    file.write_text(json.dumps(settings | {"processor_class": full}))
    with pytest.raises(ImportError, match="[Tt]orchvision"):
        transformers.AutoProcessor.from_pretrained(tmp_path)
    loaded = auto_processor(tmp_path)
    pictures = [picture(60, 60, 0), picture(50, 120, 1)]
    before, after = process(processor, pictures), process(loaded, pictures)
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_unknown_families_are_refused(corpus):
    with pytest.raises(InputError, match="'flava'.*clip.*internvl"):
        build_processor("flava", None, corpus)


# --- the small models that the processors' layouts are compared with


@pytest.mark.parametrize("case", families.CASES, ids=str)
def test_a_row_does_not_depend_on_its_batch(case):
    model = case.model()
    for padding in case.paddings:
        if padding is not None and case.leaks:
            continue
        images = (1, 2, 0) if 2 in case.images and padding is not None else (1, 1, 1)
        with torch.no_grad():
            together = case.outputs(model, case.inputs(3, padding=padding, images_per_prompt=images))
            for row in range(3):
                alone = case.outputs(model, case.inputs([row], padding=padding, images_per_prompt=images[row]))
                assert torch.allclose(alone[0], together[row], atol=5e-5), (padding, row)


@pytest.mark.parametrize("case", families.GENERATIVE, ids=str)
def test_generation_with_and_without_cache(case):
    model = case.model()
    images = (1, 2, 0) if 2 in case.images else (1, 1, 1)
    inputs = case.generate_inputs(3, images_per_prompt=images)
    cached = model.generate(**inputs, do_sample=False, use_cache=True)
    plain = model.generate(**inputs, do_sample=False, use_cache=False)
    assert torch.equal(cached, plain)


@pytest.mark.parametrize("case", families.GROUPED, ids=str)
@pytest.mark.parametrize("heads, groups", [(14, 2), (9, 3), (28, 4), (32, 8), (16, 2), (8, 1)])
def test_grouped_heads(case, heads, groups):
    model = case.model(heads=heads, kv_heads=groups, language_layers=1, vision_layers=2)
    assert torch.isfinite(case.outputs(model, case.inputs(1))[0]).all()


@pytest.mark.parametrize("case", families.CASES, ids=str)
def test_the_small_models_train(case):
    model = case.model()
    case.loss(model, case.inputs(3)).backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert sum(gradient.abs().sum() > 0 for gradient in gradients) > len(gradients) // 2
