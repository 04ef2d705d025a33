"""Answers to conversations: what `generate` says for each alone, whatever else is in the batch."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from comp_edge.errors import InputError
from comp_edge.evaluators.chat import answers
from comp_edge.surgery import apply_plan
from tests.comp_edge.plans import tiny_plan

GREEDY = {"max_new_tokens": 6, "do_sample": False}


def picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (64, 64, 3), dtype=np.uint8))


def ask(text: str, *images: Any) -> list[dict[str, Any]]:
    content = [*({"type": "image", "image": image} for image in images), {"type": "text", "text": text}]
    return [{"role": "user", "content": content}]


def test_a_pruned_model_says_what_the_task_makes_it_say(make_model: Any, processor: Any, tiny_task: Any) -> None:
    model = make_model(seed=1)
    apply_plan(model, tiny_plan(prompt=tiny_task.prompt_length - 16))
    split = tiny_task.split("test")
    rows = split.questions[:30]
    given = answers(
        model,
        processor,
        [ask(row[1], Image.fromarray(split.images[row[0]])) for row in rows],
        max_new_tokens=tiny_task.answer_length,
        do_sample=False,
    )
    expected = tiny_task.generate(model, tiny_task.batch("test", list(range(30))))
    assert [answer.text.strip() for answer in given] == expected
    assert len(set(expected)) > 10
    assert [answer.prompt_tokens for answer in given] == [len(tiny_task.prompt_ids(row[1])) for row in rows]
    assert {answer.new_tokens for answer in given} <= set(range(1, tiny_task.answer_length + 1))


def test_an_answer_does_not_depend_on_the_batch(tiny_model: Any, processor: Any) -> None:
    conversations = [
        ask("what digit is red", picture(0)),
        ask("how many digits are there"),
        ask("are they the same", picture(1), picture(2)),
        ask("is there a blue one", picture(3)),
        [*ask("what digit is red", picture(0)), {"role": "assistant", "content": [{"type": "text", "text": "4"}]}],
    ]
    before = copy.deepcopy(conversations)
    together = answers(tiny_model, processor, conversations, **GREEDY)
    alone = [answers(tiny_model, processor, [conversation], **GREEDY)[0] for conversation in conversations]
    assert together == alone
    assert len({answer.text for answer in together}) == len(conversations)
    assert conversations == before


def test_an_answer_is_what_generate_adds_to_the_prompt(tiny_model: Any, processor: Any) -> None:
    conversation = ask("what digit is red", picture(0))
    prompt = processor.apply_chat_template(conversation, add_generation_prompt=True)
    inputs = processor(images=[picture(0)], text=[prompt], return_tensors="pt")
    added = tiny_model.generate(**inputs, **GREEDY)[0, inputs["input_ids"].shape[1] :]
    (answer,) = answers(tiny_model, processor, [conversation], **GREEDY)
    assert answer.text == processor.decode(added, skip_special_tokens=True)
    assert (answer.prompt_tokens, answer.new_tokens) == (inputs["input_ids"].shape[1], len(added))


def test_what_a_model_cannot_take_is_named(tiny_model: Any, processor: Any) -> None:
    clip = [{"role": "user", "content": [{"type": "video", "video": "clip.mp4"}, {"type": "text", "text": "what"}]}]
    with pytest.raises(InputError, match="holds 'video'; comp-edge models take 'image' and 'text'"):
        answers(tiny_model, processor, [clip], **GREEDY)
    bare = copy.copy(processor)
    bare.chat_template = None
    with pytest.raises(InputError, match="LlavaProcessor has no chat template: save one as chat_template.jinja"):
        answers(tiny_model, bare, [ask("what", picture(0))], **GREEDY)


# ---- BLIP: no chat template, an encoder for the question, captions that repeat their beginning


def blip_processor() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BlipImageProcessorPil, BlipProcessor, PreTrainedTokenizerFast

    words = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", *(f"w{i}" for i in range(28))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]")
    return BlipProcessor(BlipImageProcessorPil(size={"height": 32, "width": 32}), fast)


def blip(name: str) -> Any:
    import transformers

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.BlipConfig(
        text_config={
            **sizes,
            "vocab_size": 32,
            "encoder_hidden_size": 32,
            "max_position_embeddings": 64,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "sep_token_id": 2,
            "pad_token_id": 0,
            "is_decoder": True,
        },
        vision_config={**sizes, "image_size": 32, "patch_size": 16},
    )
    torch.manual_seed(0)
    model = getattr(transformers, name)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, 0.6)
    return model


@pytest.mark.parametrize("name", ["BlipForQuestionAnswering", "BlipForConditionalGeneration"])
def test_a_prompt_without_a_template(name: str) -> None:
    model, processor = blip(name), blip_processor()
    questions = ["w3 w7 w20", "w5", "w9 w2 w2 w11 w4 w6"]
    conversations = [ask(text, picture(i)) for i, text in enumerate(questions)]
    given = answers(model, processor, conversations, **GREEDY)
    for i, (text, answer) in enumerate(zip(questions, given, strict=True)):
        inputs = processor(images=[picture(i)], text=[text], return_tensors="pt")
        output = processor.decode(model.generate(**inputs, **GREEDY)[0], skip_special_tokens=True)
        if name == "BlipForConditionalGeneration":
            assert output.startswith(text)
            output = output.removeprefix(text).strip()
        assert answer.text == output
    assert len({answer.text for answer in given}) == len(questions)
