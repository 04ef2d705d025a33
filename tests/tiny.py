"""A LLaVA and a task small enough to test with in milliseconds, of the genuine classes.

`load_task("…/tests/tiny.py:TinyVQA", processor)` works: this file is also the example of a task of one's own.
"""

from __future__ import annotations

import random
from functools import cache
from typing import Any

import numpy as np
import torch

from comp_edge.tasks import digits
from comp_edge.tasks.vqa import Split, VQATask

SIDE, PATCH = 64, 16
IMAGE_TOKENS = (SIDE // PATCH) ** 2
PAD, BOS, EOS, IMAGE = 0, 1, 2, 3  # as `comp_edge.reference.llava_digits.SPECIALS`
VOCABULARY = 512
IMAGES = {"train": 40, "val": 20, "test": 20}


@cache
def tiny_split(split: str, images: int, per_image: int = 3) -> tuple[np.ndarray, list[list]]:
    """Images [n, 64, 64, 3] and questions of a split, of the same kind as `digit_vqa`'s."""
    rng = np.random.default_rng(["train", "val", "test"].index(split))
    glyphs, labels, pools = digits.glyph_pools()
    pictures, questions = [], []
    for i in range(images):
        picture, scene = digits.draw(rng, glyphs, labels, pools[split])
        pictures.append(picture)
        for k in range(per_image):
            kind = (i + k) % len(digits.KINDS)
            questions.append([i, *digits.ask(rng, digits.KINDS[kind], scene), kind])
    return np.stack(pictures), questions


class TinyVQA(VQATask):
    """40/20/20 images, three questions each; batches of four images."""

    name = "tiny_vqa"
    kinds = digits.KINDS

    def __init__(self, processor: Any) -> None:
        super().__init__(processor, images_per_batch=4, questions_per_image=3, eval_batch=30)

    def load_split(self, split: str) -> Split:
        images, questions = tiny_split(split, IMAGES[split])
        return Split(images=images, questions=questions)


def corpus() -> list[str]:
    """Prompts and answers of a few hundred scenes: what the tokenizer of the tests is trained on."""
    return [f"USER: {question} {answer}" for _, question, answer, _ in tiny_split("train", 300)[1]]


def make_processor(*, patch: int = PATCH) -> Any:
    """The processor of `llava-digits`, for models with this patch size."""
    from comp_edge.reference.llava_digits import build_processor

    processor = build_processor(corpus())
    processor.patch_size = patch
    return processor


def make_model(
    *,
    seed: int = 0,
    vision_layers: int = 3,
    language_layers: int = 3,
    width: int = 32,
    heads: int = 4,
    kv_heads: int = 2,
    ffn: int = 64,
    patch: int = PATCH,
    feature_layer: int = -1,
    language_bias: bool = False,
) -> Any:
    """A genuine `LlavaForConditionalGeneration` in eval mode, with lively random weights and biases.

    transformers' initial weights are so small that attention is all but uniform and every token equally important;
    these are scaled so that heads look at different tokens.

    Args:
        heads: query heads of both streams; the language model has `kv_heads` key-value heads for them.
        feature_layer: `vision_feature_layer`; -2 leaves the last vision layer unused.
        language_bias: biases on all projections of the language model, too (CLIP's always have them).
    """
    from transformers import CLIPVisionConfig, GenerationConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=width,
            intermediate_size=ffn,
            num_hidden_layers=vision_layers,
            num_attention_heads=heads,
            image_size=SIDE,
            patch_size=patch,
            hidden_act="gelu",
            projection_dim=width,
        ),
        text_config=LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=width,
            intermediate_size=ffn,
            num_hidden_layers=language_layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            max_position_embeddings=256,
            attention_bias=language_bias,
            mlp_bias=language_bias,
            bos_token_id=BOS,
            eos_token_id=EOS,
            pad_token_id=PAD,
        ),
        image_token_id=IMAGE,
        image_seq_length=(SIDE // patch) ** 2,
        vision_feature_layer=feature_layer,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
    )
    # The global generator is left as it was: a test's own draws do not depend on how many models it makes.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlavaForConditionalGeneration(config).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                _enliven(name, parameter)
    model.generation_config = GenerationConfig(bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD, max_new_tokens=8)
    return model


def _enliven(name: str, parameter: torch.Tensor) -> None:
    if "norm" in name and name.endswith("weight"):
        parameter.normal_(1.0, 0.2)
    elif parameter.ndim == 1:
        parameter.normal_(0.0, 0.1)
    elif "embed" in name:
        parameter.normal_(0.0, 1.0)
    else:
        # q and k a little larger still: logits of order 2 give attention some peaks.
        gain = 1.5 if "q_proj" in name or "k_proj" in name else 1.0
        parameter.normal_(0.0, gain * parameter[0].numel() ** -0.5)


def seed_everything(seed: int) -> None:
    """One seed for every generator that the code under test might use."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
