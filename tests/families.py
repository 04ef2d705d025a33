"""Every family in small: genuine classes, lively random weights, and inputs as the family's processor lays them out.

A test takes `CASES` (or some of them, by `generative` or `grouped`) and never needs to know a family's input names:

    model = case.model(seed=0, heads=9, kv_heads=3)
    inputs = case.inputs(3, padding="left", images_per_prompt=(1, 2, 0))
    rows = case.outputs(model, inputs)             # one tensor a prompt, padding left out
    alone = case.outputs(model, case.inputs([2], images_per_prompt=0))

Row k of a seed is always the same prompt with the same images, whatever it is batched with; without padding
(`padding=None`) the rows are others, all of one length.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

VOCABULARY = 256
PAD, BOS, EOS, IMAGE, FAKE, GLOBAL, OPEN, CLOSE, VIDEO, SEP, CLS = range(11)
WORDS = range(16, 250)  # ids of ordinary text; CLIP's own specials lie above
CLIP_BOS, CLIP_EOS = 254, 255
SIGLIP_PAD, SIGLIP_TEXT = 1, 16  # SigLIP pads with </s>, always to the full length and without a mask
SIDE = 64
NAFLEX_PATCHES = 20
NAFLEX_SHAPES = ((4, 4), (2, 7), (5, 4), (6, 3))  # patches of an image, height by width
QWEN_PATCH, QWEN_MERGE, QWEN_FRAMES, QWEN_WINDOW = 4, 2, 2, 16  # windows of 4x4 patches
QWEN_GRIDS = ((8, 8), (6, 8), (4, 12), (12, 6))  # the second and the last leave ragged windows
ANSWER = 2  # words of a BLIP answer, between [DEC] and [SEP]


@dataclass(frozen=True)
class Row:
    """One prompt: its words and its number of images, all drawn from seed and row number only."""

    number: int
    words: list[int]
    images: int
    seed: int

    def picture(self, image: int, *shape: int) -> torch.Tensor:
        """Normalised pixels: coarse blobs with some noise, in -1..1."""
        rng = _rng(self.seed, self.number, 10 + image)
        noise = torch.rand(shape, generator=rng)
        coarse = torch.rand(shape[0], 4, 4, generator=rng)
        if len(shape) == 3:
            coarse = torch.nn.functional.interpolate(coarse[None], size=shape[1:], mode="bilinear")[0]
        else:
            coarse = coarse.flatten(1).repeat(1, -(-shape[1] // 16))[:, : shape[1]]
        return 0.5 * noise + 1.5 * coarse - 1.0


@dataclass(frozen=True)
class Sizes:
    """Options of every model; a family without grouped heads, a tied output, … has no use for the option.

    The vision width is `vision_heads * vision_head_dim`, the language width `heads * head_dim`.
    """

    vision_layers: int = 3
    language_layers: int = 3
    vision_heads: int = 4
    vision_head_dim: int = 8
    vision_ffn: int = 64
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 8
    ffn: int = 64
    tied: bool | None = None  # whether the output shares the embedding's matrix; None is as in the released models
    feature_layer: int = -2  # LLaVA: the vision layer that is used
    full_layers: tuple[int, ...] = (1,)  # Qwen2.5-VL: vision layers that attend beyond their window
    qk_norm: bool = False  # InternVL's vision tower

    @property
    def width(self) -> int:
        return self.heads * self.head_dim

    @property
    def vision_width(self) -> int:
        return self.vision_heads * self.vision_head_dim


@dataclass(frozen=True)
class FamilyCase:
    """A family: how its small model is built, what it takes and what it gives.

    Attributes:
        build: gives the model of these sizes with transformers' own initial weights.
        layout: `layout(rows, padding)` gives the inputs of `forward`.
        generative: has `generate`.
        grouped: the language model takes `kv_heads`, fewer than `heads`.
        paddings: what `inputs` accepts as `padding`; the first is the default.
        leaks: with padding, what the dense model says of a prompt depends on the padding. transformers 5.23 loses the
            mask of BLIP's cross-attention, so an answer sees the padding of its question.
        images: how many images a prompt may have.
    """

    name: str
    build: Callable[[Sizes], Any]
    layout: Callable[[list[Row], str | None], dict[str, torch.Tensor]]
    generative: bool = True
    grouped: bool = True
    paddings: tuple[str | None, ...] = ("left", "right", None)
    images: tuple[int, ...] = (0, 1, 2)
    leaks: bool = False

    def __str__(self) -> str:
        return self.name

    def model(self, seed: int = 0, **options: Any) -> Any:
        """The model in eval mode.

        transformers' initial weights are so small that attention is all but uniform; these let heads look at
        different tokens. The options are those of `Sizes`.
        """
        # The global generator is left as it was: a test's own draws do not depend on how many models it makes.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = self.build(Sizes(**options)).eval()
            _enliven(model)
        return model

    def inputs(
        self,
        batch: int | Sequence[int],
        *,
        seed: int = 0,
        padding: str | None = "default",
        images_per_prompt: int | Sequence[int] = 1,
        prompt_lengths: int | Sequence[int] | None = None,
    ) -> dict[str, torch.Tensor]:
        """What `forward` takes, for so many prompts or for the rows named.

        Args:
            padding: "left" or "right" pads prompts of different lengths; None gives prompts of one length.
            images_per_prompt: one number, or one a row.
            prompt_lengths: words of the prompts, special and image tokens not counted: one number, or one a row.

        Raises:
            ValueError: the family knows no such padding or number of images.
        """
        numbers = list(range(batch)) if isinstance(batch, int) else list(batch)
        padding = self.paddings[0] if padding == "default" else padding
        if padding not in self.paddings:
            raise ValueError(f"{self.name} takes padding {self.paddings}, not {padding!r}.")
        images = [images_per_prompt] * len(numbers) if isinstance(images_per_prompt, int) else list(images_per_prompt)
        if not set(images) <= set(self.images):
            raise ValueError(f"{self.name} takes {self.images} images a prompt, not {images}.")
        if prompt_lengths is None:
            equal = padding is None and len(self.paddings) > 1
            lengths = [5 if equal else 4 + (3 * number) % 7 for number in numbers]
        else:
            lengths = [prompt_lengths] * len(numbers) if isinstance(prompt_lengths, int) else list(prompt_lengths)
        rows = []
        for number, n, length in zip(numbers, images, lengths, strict=True):
            rows.append(Row(number=number, words=_words(seed, number, 0, length), images=n, seed=seed))
        return self.layout(rows, padding)

    def generate_inputs(self, batch: int | Sequence[int], **options: Any) -> dict[str, torch.Tensor]:
        """What `generate` takes. Captioning continues prompts of one length only: BLIP counts positions from the left."""
        if not self.generative:
            raise ValueError(f"{self.name} does not generate.")
        if self.name == "blip-captioning":
            options.setdefault("padding", None)
        inputs = self.inputs(batch, **options)
        inputs.pop("labels", None)
        return inputs

    def outputs(self, model: Any, inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        """What the model says of each prompt: logits [tokens, vocabulary] without padding, or embeddings, or scores."""
        if self.name in ("clip", "siglip", "siglip2"):
            result = model(**inputs)
            return list(torch.cat([result.image_embeds, result.text_embeds], dim=-1))
        if self.name == "blip-retrieval":
            return list(model(**inputs).itm_score)
        if self.name == "blip-vqa":  # its output carries no logits
            seen = []
            hook = model.text_decoder.register_forward_hook(lambda _, __, result: seen.append(result.logits))
            try:
                model(**inputs)
            finally:
                hook.remove()
            return list(seen[0])
        logits = model(**inputs).logits
        return [row[mask.bool()] for row, mask in zip(logits, inputs["attention_mask"], strict=True)]

    def loss(self, model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """A scalar to train on: the next word, the contrast within the batch, or match and mismatch by turns."""
        if self.name in ("clip", "siglip", "siglip2"):
            return model(**inputs, return_loss=True).loss
        if self.name == "blip-retrieval":
            scores = model(**inputs).itm_score
            return torch.nn.functional.cross_entropy(scores, torch.arange(len(scores)) % 2)
        if self.name == "blip-vqa":
            return model(**inputs).loss
        ignored = (inputs["attention_mask"] == 0) | (inputs["input_ids"] == IMAGE)
        return model(**inputs, labels=inputs["input_ids"].masked_fill(ignored, -100)).loss


# --- models


def _clip(sizes: Sizes) -> Any:
    from transformers import CLIPConfig, CLIPModel

    return CLIPModel(
        CLIPConfig(
            vision_config={
                "hidden_size": sizes.vision_width,
                "intermediate_size": sizes.vision_ffn,
                "num_hidden_layers": sizes.vision_layers,
                "num_attention_heads": sizes.vision_heads,
                "image_size": SIDE,
                "patch_size": 16,
            },
            text_config={
                "vocab_size": VOCABULARY,
                "hidden_size": sizes.width,
                "intermediate_size": sizes.ffn,
                "num_hidden_layers": sizes.language_layers,
                "num_attention_heads": sizes.heads,
                "max_position_embeddings": 32,
                "bos_token_id": CLIP_BOS,
                "eos_token_id": CLIP_EOS,
                "pad_token_id": CLIP_EOS,
            },
            projection_dim=24,
        )
    )


def _siglip(sizes: Sizes, naflex: bool = False) -> Any:
    from transformers import Siglip2Config, Siglip2Model, SiglipConfig, SiglipModel

    config, model = (Siglip2Config, Siglip2Model) if naflex else (SiglipConfig, SiglipModel)
    grid = {"patch_size": 16, "num_patches": 16} if naflex else {"patch_size": 16, "image_size": SIDE}
    return model(
        config(
            vision_config={
                "hidden_size": sizes.vision_width,
                "intermediate_size": sizes.vision_ffn,
                "num_hidden_layers": sizes.vision_layers,
                "num_attention_heads": sizes.vision_heads,
                **grid,
            },
            text_config={
                "vocab_size": VOCABULARY,
                "hidden_size": sizes.width,
                "intermediate_size": sizes.ffn,
                "num_hidden_layers": sizes.language_layers,
                "num_attention_heads": sizes.heads,
                "max_position_embeddings": SIGLIP_TEXT,
                "projection_size": sizes.vision_width,  # both towers' embeddings are compared as they are
                "bos_token_id": SIGLIP_PAD,
                "eos_token_id": SIGLIP_PAD,
                "pad_token_id": SIGLIP_PAD,
            },
        )
    )


def _siglip2(sizes: Sizes) -> Any:
    return _siglip(sizes, naflex=True)


def _blip(model: str, sizes: Sizes) -> Any:
    import transformers

    config = transformers.BlipConfig(
        vision_config={
            "hidden_size": sizes.vision_width,
            "intermediate_size": sizes.vision_ffn,
            "num_hidden_layers": sizes.vision_layers,
            "num_attention_heads": sizes.vision_heads,
            "image_size": SIDE,
            "patch_size": 16,
        },
        text_config={
            "vocab_size": VOCABULARY,
            "hidden_size": sizes.width,
            "intermediate_size": sizes.ffn,
            "num_hidden_layers": sizes.language_layers,
            "num_attention_heads": sizes.heads,
            "max_position_embeddings": 64,
            "bos_token_id": BOS,  # BLIP's [DEC]
            "eos_token_id": EOS,
            "sep_token_id": SEP,
            "pad_token_id": PAD,
        },
        image_text_hidden_size=24,
    )
    built = getattr(transformers, model)(config)
    if hasattr(built, "text_decoder"):
        built.text_decoder.generation_config = _generation()
    return built


def _llama(sizes: Sizes) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "vocab_size": VOCABULARY,
        "hidden_size": sizes.width,
        "intermediate_size": sizes.ffn,
        "num_hidden_layers": sizes.language_layers,
        "num_attention_heads": sizes.heads,
        "num_key_value_heads": sizes.kv_heads,
        "max_position_embeddings": 512,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "pad_token_id": PAD,
    }


def _llava(sizes: Sizes) -> Any:
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    return _generative(
        LlavaForConditionalGeneration,
        LlavaConfig(
            vision_config={
                "model_type": "clip_vision_model",
                "hidden_size": sizes.vision_width,
                "intermediate_size": sizes.vision_ffn,
                "num_hidden_layers": sizes.vision_layers,
                "num_attention_heads": sizes.vision_heads,
                "image_size": SIDE,
                "patch_size": 16,
                "projection_dim": 32,
            },
            text_config=_llama(sizes),
            image_token_index=IMAGE,
            image_seq_length=16,
            vision_feature_layer=sizes.feature_layer,
            tie_word_embeddings=bool(sizes.tied),
        ),
    )


def _idefics3(sizes: Sizes, model: str = "Idefics3") -> Any:
    import transformers

    return _generative(
        getattr(transformers, f"{model}ForConditionalGeneration"),
        getattr(transformers, f"{model}Config")(
            vision_config={
                "hidden_size": sizes.vision_width,
                "intermediate_size": sizes.vision_ffn,
                "num_hidden_layers": sizes.vision_layers,
                "num_attention_heads": sizes.vision_heads,
                "image_size": SIDE,
                "patch_size": 8,
            },
            text_config=_llama(sizes),
            image_token_id=IMAGE,
            pad_token_id=PAD,
            scale_factor=2,
            tie_word_embeddings=bool(sizes.tied),
        ),
    )


def _smolvlm(sizes: Sizes) -> Any:
    return _idefics3(sizes, "SmolVLM")


def _qwen(sizes: Sizes) -> Any:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    half = sizes.head_dim // 2
    spatial = 3 * half // 8  # 16, 24, 24 of 64, as in the released models
    return _generative(
        Qwen2_5_VLForConditionalGeneration,
        Qwen2_5_VLConfig(
            vision_config={
                "depth": sizes.vision_layers,
                "hidden_size": sizes.vision_width,
                "intermediate_size": sizes.vision_ffn,
                "num_heads": sizes.vision_heads,
                "patch_size": QWEN_PATCH,
                "spatial_merge_size": QWEN_MERGE,
                "temporal_patch_size": QWEN_FRAMES,
                "window_size": QWEN_WINDOW,
                "out_hidden_size": sizes.width,
                "fullatt_block_indexes": list(sizes.full_layers),
            },
            text_config={
                **_llama(sizes),
                "model_type": "qwen2_5_vl_text",
                "rope_parameters": {
                    "rope_type": "default",
                    "rope_theta": 1e6,
                    "mrope_section": [half - 2 * spatial, spatial, spatial],
                },
            },
            image_token_id=IMAGE,
            video_token_id=VIDEO,
            vision_start_token_id=OPEN,
            vision_end_token_id=CLOSE,
            tie_word_embeddings=sizes.tied is not False,
        ),
    )


def _internvl(sizes: Sizes) -> Any:
    from transformers import InternVLConfig, InternVLForConditionalGeneration

    return _generative(
        InternVLForConditionalGeneration,
        InternVLConfig(
            vision_config={
                "hidden_size": sizes.vision_width,
                "intermediate_size": sizes.vision_ffn,
                "num_hidden_layers": sizes.vision_layers,
                "num_attention_heads": sizes.vision_heads,
                "attention_bias": True,
                "use_qk_norm": sizes.qk_norm,
                "image_size": [SIDE, SIDE],
                "patch_size": [8, 8],
            },
            text_config={**_llama(sizes), "model_type": "qwen2"},
            image_token_id=IMAGE,
            image_seq_length=16,
            tie_word_embeddings=bool(sizes.tied),
        ),
    )


def _generation() -> Any:
    from transformers import GenerationConfig

    return GenerationConfig(bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD, max_new_tokens=8)


def _generative(cls: Any, config: Any) -> Any:
    model = cls(config)
    model.generation_config = _generation()
    return model


@torch.no_grad()
def _enliven(model: Any) -> None:
    for name, parameter in model.named_parameters():
        lower = name.lower()
        if parameter.ndim == 0:  # CLIP's and SigLIP's logit scale and bias
            continue
        if "lambda_" in lower:
            parameter.uniform_(0.5, 1.0)
        elif parameter.ndim == 1 and name.endswith("weight"):  # norms
            parameter.normal_(1.0, 0.2)
        elif parameter.ndim == 1 and "class_embedding" not in lower:
            parameter.normal_(0.0, 0.1)
        elif "patch_embed" not in lower and ("embed" in lower or "cls_token" in lower or "probe" in lower):
            parameter.normal_(0.0, 1.0)
        else:
            parameter.normal_(0.0, parameter[0].numel() ** -0.5)
            # q and k a little larger still: logits of order 2 give attention some peaks.
            if any(part in lower for part in ("q_proj", "k_proj", ".query.", ".key.")):
                parameter.mul_(1.5)
            elif "qkv" in lower or "in_proj" in lower:
                parameter[: 2 * len(parameter) // 3].mul_(1.5)
    # Tied to the output, embeddings of that size would have every token predict itself.
    language = model.text_decoder if hasattr(model, "text_decoder") else model
    if not hasattr(language, "generate"):
        return
    table, head = language.get_input_embeddings(), language.get_output_embeddings()
    if head.weight is table.weight:
        table.weight.mul_(0.3)
    # A language model that has learnt anything never says the image placeholder. Its embedding is not used.
    tokens = {getattr(model.config, name, None) for name in ("image_token_id", "video_token_id")} - {None}
    for token in tokens:
        table.weight[token] = 0.0
        head.weight[token] = 0.0


# --- inputs


def _rng(seed: int, row: int, stream: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed * 10_007 + row * 101 + stream)


def _words(seed: int, row: int, stream: int, length: int) -> list[int]:
    return torch.randint(WORDS.start, WORDS.stop, (length,), generator=_rng(seed, row, stream)).tolist()


def _padded(rows: list[list[int]], padding: str | None, *, pad: int = PAD) -> dict[str, torch.Tensor]:
    """input_ids and attention_mask [rows, longest]."""
    longest = max(map(len, rows))
    if padding is None and min(map(len, rows)) != longest:
        raise ValueError(f"prompts of {sorted(set(map(len, rows)))} tokens need padding.")
    ids, mask = [], []
    for row in rows:
        fill = longest - len(row)
        ids.append([pad] * fill + row if padding == "left" else row + [pad] * fill)
        mask.append([0] * fill + [1] * len(row) if padding == "left" else [1] * len(row) + [0] * fill)
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


def _prompt(row: Row, blocks: list[list[int]], *, bos: bool = True) -> list[int]:
    """BOS, the images with a word between two, then the remaining words."""
    words = list(row.words)
    tokens = [BOS] if bos else []
    for index, block in enumerate(blocks):
        if index and words:
            tokens.append(words.pop(0))
        tokens += block
    return tokens + words


def _pictures(rows: list[Row]) -> torch.Tensor:
    """[images of all rows in order, 3, SIDE, SIDE]"""
    return torch.stack([row.picture(i, 3, SIDE, SIDE) for row in rows for i in range(row.images)])


def _clip_inputs(rows: list[Row], padding: str | None) -> dict[str, torch.Tensor]:
    text = _padded([[CLIP_BOS, *row.words, CLIP_EOS] for row in rows], padding, pad=CLIP_EOS)
    return {**text, "pixel_values": _pictures(rows)}


def _siglip_text(rows: list[Row]) -> torch.Tensor:
    filled = [row.words[: SIGLIP_TEXT - 1] + [SIGLIP_PAD] * SIGLIP_TEXT for row in rows]
    return torch.tensor([row[:SIGLIP_TEXT] for row in filled])


def _siglip_inputs(rows: list[Row], padding: str | None) -> dict[str, torch.Tensor]:
    return {"input_ids": _siglip_text(rows), "pixel_values": _pictures(rows)}


def _siglip2_inputs(rows: list[Row], padding: str | None) -> dict[str, torch.Tensor]:
    patches = torch.zeros(len(rows), NAFLEX_PATCHES, 3 * 16 * 16)
    mask = torch.zeros(len(rows), NAFLEX_PATCHES, dtype=torch.int32)
    shapes = [NAFLEX_SHAPES[row.number % len(NAFLEX_SHAPES)] for row in rows]
    for index, (row, (height, width)) in enumerate(zip(rows, shapes, strict=True)):
        patches[index, : height * width] = row.picture(0, height * width, patches.shape[-1])
        mask[index, : height * width] = 1
    return {
        "input_ids": _siglip_text(rows),
        "pixel_values": patches,
        "pixel_attention_mask": mask,
        "spatial_shapes": torch.tensor(shapes),
    }


def _blip_inputs(rows: list[Row], padding: str | None) -> dict[str, torch.Tensor]:
    return {**_padded([[CLS, *row.words, SEP] for row in rows], padding), "pixel_values": _pictures(rows)}


def _blip_vqa_inputs(rows: list[Row], padding: str | None) -> dict[str, torch.Tensor]:
    """`labels` are the decoder's inputs, too: [DEC] answer [SEP]."""
    answers = [_words(row.seed, row.number, 1, ANSWER) for row in rows]
    return {**_blip_inputs(rows, padding), "labels": torch.tensor([[BOS, *answer, SEP] for answer in answers])}


def _with_pictures(rows: list[Row], inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {**inputs, "pixel_values": _pictures(rows)} if any(row.images for row in rows) else inputs


def _llava_inputs(rows: list[Row], padding: str | None) -> dict[str, torch.Tensor]:
    prompts = [_prompt(row, [[IMAGE] * 16] * row.images) for row in rows]
    return _with_pictures(rows, _padded(prompts, padding))


def _internvl_inputs(rows: list[Row], padding: str | None) -> dict[str, torch.Tensor]:
    prompts = [_prompt(row, [[OPEN, *[IMAGE] * 16, CLOSE]] * row.images, bos=False) for row in rows]
    return _with_pictures(rows, _padded(prompts, padding))


def _idefics3_inputs(rows: list[Row], padding: str | None) -> dict[str, torch.Tensor]:
    """pixel_values [rows, most images, 3, SIDE, SIDE]: rows with fewer images are filled with empty ones."""
    prompts = [_prompt(row, [[FAKE, GLOBAL, *[IMAGE] * 16, FAKE]] * row.images) for row in rows]
    inputs = _padded(prompts, padding)
    most = max(row.images for row in rows)
    if most:
        pixels = torch.zeros(len(rows), most, 3, SIDE, SIDE)
        mask = torch.zeros(len(rows), most, SIDE, SIDE, dtype=torch.long)
        for index, row in enumerate(rows):
            for image in range(row.images):
                pixels[index, image] = row.picture(image, 3, SIDE, SIDE)
                mask[index, image] = 1
        inputs |= {"pixel_values": pixels, "pixel_attention_mask": mask}
    return inputs


def _qwen_inputs(rows: list[Row], padding: str | None) -> dict[str, torch.Tensor]:
    """pixel_values [patches of all images, channels * frames * patch * patch]; grids differ unless lengths must not."""
    prompts, grids, patches = [], [], []
    for row in rows:
        blocks = []
        for image in range(row.images):
            number = image if padding is None else row.number + image
            height, width = QWEN_GRIDS[number % len(QWEN_GRIDS)]
            grids.append([1, height, width])
            patches.append(row.picture(image, height * width, 3 * QWEN_FRAMES * QWEN_PATCH**2))
            blocks.append([OPEN, *[IMAGE] * (height * width // QWEN_MERGE**2), CLOSE])
        prompts.append(_prompt(row, blocks, bos=False))
    inputs = _padded(prompts, padding)
    inputs["mm_token_type_ids"] = (inputs["input_ids"] == IMAGE).long()
    if grids:
        inputs |= {"pixel_values": torch.cat(patches), "image_grid_thw": torch.tensor(grids)}
    return inputs


# --- the families

CASES: tuple[FamilyCase, ...] = (
    FamilyCase("clip", _clip, _clip_inputs, generative=False, grouped=False, paddings=("right", None), images=(1,)),
    FamilyCase("siglip", _siglip, _siglip_inputs, generative=False, grouped=False, paddings=(None,), images=(1,)),
    FamilyCase("siglip2", _siglip2, _siglip2_inputs, generative=False, grouped=False, paddings=(None,), images=(1,)),
    FamilyCase(
        "blip-vqa",
        partial(_blip, "BlipForQuestionAnswering"),
        _blip_vqa_inputs,
        grouped=False,
        paddings=(None, "right"),
        images=(1,),
        leaks=True,
    ),
    FamilyCase(
        "blip-retrieval",
        partial(_blip, "BlipForImageTextRetrieval"),
        _blip_inputs,
        generative=False,
        grouped=False,
        paddings=("right", None),
        images=(1,),
    ),
    FamilyCase(
        "blip-captioning",
        partial(_blip, "BlipForConditionalGeneration"),
        _blip_inputs,
        grouped=False,
        paddings=("right", None),
        images=(1,),
    ),
    FamilyCase("llava", _llava, _llava_inputs),
    FamilyCase("idefics3", _idefics3, _idefics3_inputs),
    FamilyCase("smolvlm", _smolvlm, _idefics3_inputs),
    FamilyCase("qwen2.5-vl", _qwen, _qwen_inputs),
    FamilyCase("internvl", _internvl, _internvl_inputs),
)
GENERATIVE = tuple(case for case in CASES if case.generative)
GROUPED = tuple(case for case in CASES if case.grouped)


def case_named(name: str) -> FamilyCase:
    return next(case for case in CASES if case.name == name)
