"""Processors of every family, built offline: transformers' own classes around a tokenizer trained on a small corpus.

Where torchvision is missing, transformers 5.23 cannot make a processor that has a video part (Qwen2.5-VL, InternVL,
SmolVLM 2), not even for images. Importing this module then registers processors of the same families for images alone:
`AutoProcessor` finds them by the model's configuration. What they save names no class, so that a machine with
torchvision reads the same folder with the full one. `auto_processor` also reads folders that do name it.
"""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoConfig, AutoProcessor, Idefics3Processor, InternVLProcessor, Qwen2_5_VLProcessor
from transformers.utils import is_torchvision_available

from comp_edge.errors import InputError
from comp_edge.reference import llava_digits, vocabularies

SMOLVLM_TEMPLATE = (
    "<|im_start|>{% for message in messages %}{{ message['role'] | capitalize }}"
    "{% if message['content'][0]['type'] == 'image' %}:{% else %}: {% endif %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}<end_of_utterance>\n{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)
# Enough for a tokenizer whose words mean nothing: that of a model with random weights.
CORPUS = [
    f"{colour} {thing} {place} {number}"
    for number, (colour, thing, place) in enumerate(
        itertools.product(
            ("red", "green", "blue", "yellow", "black", "white"),
            ("house", "river", "engine", "garden", "letter", "window", "bridge", "market"),
            ("north", "south", "inside", "above", "behind", "between"),
        )
    )
]
# Of both Qwen families; they differ in what stands for an image.
CHATML_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% if message['content'] is string %}"
    "{{ message['content'] }}{% else %}{% for part in message['content'] %}{% if part['type'] == 'image' %}IMAGE"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# model type -> attribute of the configuration -> token that it is the id of
PLACEHOLDERS: dict[str, dict[str, str]] = {
    "llava": {"image_token_index": "<image>"},
    "idefics3": {"image_token_id": "<image>"},
    "smolvlm": {"image_token_id": "<image>"},
    "qwen2_5_vl": {
        "image_token_id": "<|image_pad|>",
        "video_token_id": "<|video_pad|>",
        "vision_start_token_id": "<|vision_start|>",
        "vision_end_token_id": "<|vision_end|>",
    },
    "internvl": {"image_token_id": "<IMG_CONTEXT>"},
}


class _WithoutVideo:
    """What turns a processor with a video part into one for images; its folders stay readable by the full class."""

    video_section: dict[str, Any] = {}

    @classmethod
    def get_attributes(cls) -> list[str]:
        return ["image_processor", "tokenizer"]

    def to_dict(self) -> dict[str, Any]:
        output = super().to_dict()
        del output["processor_class"]
        return output | {"video_processor": self.video_settings()}

    def video_settings(self) -> dict[str, Any]:
        """What the full class would be told of videos: as of images, frame by frame."""
        settings = self.image_processor.to_dict()
        kept = ("size", "image_mean", "image_std", "patch_size", "temporal_patch_size", "merge_size")
        return {key: settings[key] for key in kept if key in settings} | self.video_section

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        super().save_pretrained(save_directory, **kwargs)
        # The tokenizer's file would name the class, too.
        self.tokenizer._set_processor_class(None)
        self.tokenizer.save_pretrained(save_directory)


class Qwen2_5_VLImages(_WithoutVideo, Qwen2_5_VLProcessor):
    """`Qwen2_5_VLProcessor` for images alone."""

    video_section = {"video_processor_type": "Qwen2VLVideoProcessor"}


class InternVLImages(_WithoutVideo, InternVLProcessor):
    """`InternVLProcessor` for images alone."""

    video_section = {"video_processor_type": "InternVLVideoProcessor"}


# SmolVLM's processor treats images as Idefics3's does; the first SmolVLMs were released with the latter.
IMAGES_ONLY: dict[str, Any] = {
    "qwen2_5_vl": Qwen2_5_VLImages,
    "internvl": InternVLImages,
    "smolvlm": Idefics3Processor,
}
if not is_torchvision_available():
    for _model_type, _class in IMAGES_ONLY.items():
        AutoProcessor.register(type(AutoConfig.for_model(_model_type)), _class, exist_ok=True)


def auto_processor(folder: str | Path) -> Any:
    """`AutoProcessor.from_pretrained`, for images alone where the full processor would need torchvision.

    Raises:
        OSError, ValueError: as `AutoProcessor.from_pretrained`.
    """
    if not is_torchvision_available():
        model_type = AutoConfig.from_pretrained(str(folder)).model_type
        if model_type in IMAGES_ONLY:
            return IMAGES_ONLY[model_type].from_pretrained(str(folder))
    return AutoProcessor.from_pretrained(str(folder))


def build_processor(model_type: str, config: Any, corpus: list[str], *, vocabulary: int = 512) -> Any:
    """A processor for models of this configuration, with the special tokens and the chat template of its family.

    The token ids are the tokenizer's own: `config_for` gives the configuration that agrees with them.

    Args:
        model_type: transformers' name of the family, as `config.model_type`.
        corpus: texts to train the tokenizer on.
        vocabulary: entries of the tokenizer, at most; LLaVA's always has 512.

    Raises:
        InputError: the family is unknown.
    """
    if model_type not in _BUILDERS:
        raise InputError(f"no processor is known for model type {model_type!r}; known are {', '.join(_BUILDERS)}.")
    return _BUILDERS[model_type](config, corpus, vocabulary)


def config_for(processor: Any, config: Any) -> Any:
    """A copy of the configuration with the token ids of this processor.

    The vocabulary grows if the tokenizer's is larger and never shrinks: a model keeps its true size.
    """
    config = copy.deepcopy(config)
    tokenizer, text = processor.tokenizer, config.get_text_config()
    text.vocab_size = max(text.vocab_size, len(tokenizer))
    text.pad_token_id, text.bos_token_id = tokenizer.pad_token_id, tokenizer.bos_token_id
    text.eos_token_id = tokenizer.eos_token_id
    if config.model_type == "blip":  # ends with [SEP]; its `eos_token_id` is not used
        text.sep_token_id = text.eos_token_id = tokenizer.sep_token_id
    for attribute, token in PLACEHOLDERS.get(config.model_type, {}).items():
        setattr(config, attribute, tokenizer.convert_tokens_to_ids(token))
    return config


def _clip(config: Any, corpus: list[str], vocabulary: int) -> Any:
    vision = config.vision_config
    return transformers.CLIPProcessor(
        image_processor=_clip_images(vision.image_size),
        tokenizer=vocabularies.clip(corpus, vocabulary, length=config.text_config.max_position_embeddings),
    )


def _clip_images(side: int) -> Any:
    return transformers.CLIPImageProcessorPil(
        size={"shortest_edge": side}, crop_size={"height": side, "width": side}, do_center_crop=True
    )


def _siglip(config: Any, corpus: list[str], vocabulary: int) -> Any:
    side = config.vision_config.image_size
    return transformers.SiglipProcessor(
        image_processor=transformers.SiglipImageProcessorPil(size={"height": side, "width": side}),
        tokenizer=vocabularies.siglip(corpus, vocabulary, length=config.text_config.max_position_embeddings),
    )


def _siglip2(config: Any, corpus: list[str], vocabulary: int) -> Any:
    vision = config.vision_config
    return transformers.Siglip2Processor(
        image_processor=transformers.Siglip2ImageProcessorPil(
            patch_size=vision.patch_size, max_num_patches=vision.num_patches
        ),
        tokenizer=vocabularies.siglip2(corpus, vocabulary, length=config.text_config.max_position_embeddings),
    )


def _blip(config: Any, corpus: list[str], vocabulary: int) -> Any:
    side = config.vision_config.image_size
    return transformers.BlipProcessor(
        image_processor=transformers.BlipImageProcessorPil(size={"height": side, "width": side}),
        tokenizer=vocabularies.blip(corpus, vocabulary, length=config.text_config.max_position_embeddings),
    )


def _llava(config: Any, corpus: list[str], vocabulary: int) -> Any:
    return transformers.LlavaProcessor(
        image_processor=_clip_images(config.vision_config.image_size),
        tokenizer=llava_digits.build_tokenizer(corpus),
        patch_size=config.vision_config.patch_size,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        num_additional_image_tokens=1,  # CLIP's CLS token
        chat_template=llava_digits.CHAT_TEMPLATE,
    )


def _idefics3(config: Any, corpus: list[str], vocabulary: int) -> Any:
    vision = config.vision_config
    smol = config.model_type == "smolvlm"
    images = transformers.SmolVLMImageProcessorPil if smol else transformers.Idefics3ImageProcessorPil
    return Idefics3Processor(
        # All released models split an image into at most four tiles a side.
        image_processor=images(
            size={"longest_edge": 4 * vision.image_size}, max_image_size={"longest_edge": vision.image_size}
        ),
        tokenizer=vocabularies.smolvlm(corpus, vocabulary, length=config.text_config.max_position_embeddings),
        image_seq_len=(vision.image_size // vision.patch_size) ** 2 // config.scale_factor**2,
        chat_template=SMOLVLM_TEMPLATE,
    )


def _qwen2_5_vl(config: Any, corpus: list[str], vocabulary: int) -> Any:
    vision = config.vision_config
    token = (vision.patch_size * vision.spatial_merge_size) ** 2  # pixels of the image that one token stands for
    return Qwen2_5_VLImages(
        image_processor=transformers.Qwen2VLImageProcessorPil(
            patch_size=vision.patch_size,
            temporal_patch_size=vision.temporal_patch_size,
            merge_size=vision.spatial_merge_size,
            size={"shortest_edge": 4 * token, "longest_edge": 16384 * token},
        ),
        tokenizer=vocabularies.qwen(corpus, vocabulary, length=config.text_config.max_position_embeddings),
        chat_template=CHATML_TEMPLATE.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>"),
    )


def _internvl(config: Any, corpus: list[str], vocabulary: int) -> Any:
    height, width = config.vision_config.image_size
    return InternVLImages(
        image_processor=transformers.GotOcr2ImageProcessorPil(
            size={"height": height, "width": width},
            image_mean=[0.485, 0.456, 0.406],
            image_std=[0.229, 0.224, 0.225],
            min_patches=1,
            max_patches=12,
        ),
        tokenizer=vocabularies.internvl(corpus, vocabulary, length=config.text_config.max_position_embeddings),
        image_seq_length=config.image_seq_length,
        chat_template=CHATML_TEMPLATE.replace("IMAGE", "<IMG_CONTEXT>\n"),
    )


_BUILDERS = {
    "clip": _clip,
    "siglip": _siglip,
    "siglip2": _siglip2,
    "blip": _blip,
    "llava": _llava,
    "idefics3": _idefics3,
    "smolvlm": _idefics3,
    "qwen2_5_vl": _qwen2_5_vl,
    "internvl": _internvl,
}
