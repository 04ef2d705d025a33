"""The two profiles: which methods a program has, and what the manifest says of them."""

from __future__ import annotations

from typing import Any, Literal

import torch

from export.bundle import DynamicSize, MethodSpec, TensorSpec
from export.executorch.lower import Method
from export.graph import (
    EXECUTORCH,
    Decode,
    LanguageModel,
    Prefill,
    TextDecoder,
    TokenEmbedding,
    VisionEncoder,
)
from export.positions import ImageGrid, positions_about
from export.reference import eos_token_ids, image_spec, pixel_range
from export.source import Source

Profile = Literal["stock", "scheduled"]
PROFILES: tuple[Profile, ...] = ("stock", "scheduled")
PROGRAM_FILE = "model.pte"
EMBEDDING_LAYOUT = "batch, token, channel"


def build_methods(profile: Profile, source: Source) -> dict[str, Method]:
    """The methods of a program.

    Args:
        source: for `stock`, with the drops inside the language model lifted.

    Raises:
        InputError: the model has no deployment form, or does not fit its positions.
    """
    language = _scheduled(source) if profile == "scheduled" else _stock(source)
    return {"vision_encoder": _vision_encoder(source), **language}


def constants(profile: Profile, source: Source) -> dict[str, Any]:
    """Constant methods. The stock runner requires `get_max_seq_len` and reads the others."""
    tokenizer = source.processor.tokenizer
    common = {
        "get_max_seq_len": context_length(source),
        "get_max_context_len": context_length(source),
        "use_kv_cache": True,
        "enable_dynamic_shape": profile == "stock",
        "get_eos_ids": list(eos_token_ids(source)),
        "get_vocab_size": source.model.config.text_config.vocab_size,
        "get_bos_id": -1 if tokenizer.bos_token_id is None else tokenizer.bos_token_id,
    }
    if profile == "scheduled":
        common["prompt_length"] = source.tokens["language"][0]
        common["image_tokens"] = source.image_tokens
    return common


def context_length(source: Source) -> int:
    """Positions of a whole request: prompt and answer."""
    return source.tokens["language"][0] + source.new_tokens


def _width(source: Source) -> int:
    return source.model.config.text_config.hidden_size


def _logits(source: Source) -> TensorSpec:
    vocabulary = source.model.config.text_config.vocab_size
    return TensorSpec(
        name="logits",
        shape=(1, vocabulary),
        dtype="float32",
        layout="batch, vocabulary",
        about="of the token that follows; greedy decoding takes the largest",
    )


def _integer(name: str, *, shape: tuple[Any, ...], layout: str, high: int, about: str) -> TensorSpec:
    return TensorSpec(name=name, shape=shape, dtype="int64", layout=layout, range=(0, high), about=about)


def _vision_encoder(source: Source) -> Method:
    image = image_spec(source)
    module = VisionEncoder(source.model, source.tokens["vision"], EXECUTORCH, size=source.image_size)
    spec = MethodSpec(
        name="vision_encoder",
        file=PROGRAM_FILE,
        inputs=(
            TensorSpec(
                name="pixel_values",
                shape=(1, 3, image.height, image.width),
                dtype="float32",
                layout="batch, channel (RGB), height, width",
                range=pixel_range(image),
            ),
        ),
        outputs=(
            TensorSpec(
                name="image_features",
                shape=(1, source.image_tokens, _width(source)),
                dtype="float32",
                layout=EMBEDDING_LAYOUT,
            ),
            *([_kept(source)] if module.says_kept else []),
        ),
        about="image tower and connector; tokens are dropped inside",
    )
    return Method(module=module, inputs=(torch.zeros(1, 3, image.height, image.width),), spec=spec)


def _kept(source: Source) -> TensorSpec:
    return _integer(
        "kept",
        shape=(1, source.image_tokens),
        layout="batch, token",
        high=source.dense_image_tokens - 1,
        about="which tokens of the dense image the rows are, counted row by row: positions need them",
    )


def _embedding_spec(source: Source, length: int | DynamicSize, about: str) -> MethodSpec:
    vocabulary = source.model.config.text_config.vocab_size
    ids = _integer("token_ids", shape=(1, length), layout="batch, token", high=vocabulary - 1, about=about)
    rows = TensorSpec(name="embeddings", shape=(1, length, _width(source)), dtype="float32", layout=EMBEDDING_LAYOUT)
    return MethodSpec(name="token_embedding", file=PROGRAM_FILE, inputs=(ids,), outputs=(rows,))


def _positions(grid: ImageGrid, prompt: int) -> TensorSpec:
    return _integer(
        "positions",
        shape=(3, prompt),
        layout="time, height and width; slot",
        high=prompt + grid.after - 1,
        about=positions_about(grid),
    )


def _scheduled(source: Source) -> dict[str, Method]:
    tokens, width = source.tokens["language"], _width(source)
    prompt, vocabulary = tokens[0], source.model.config.text_config.vocab_size
    text = source.text_tokens
    grid = source.grid
    language = LanguageModel(source.model, tokens, new_tokens=source.new_tokens, options=EXECUTORCH, grid=grid)
    start = _integer(
        "start", shape=(1,), layout="scalar", high=text, about="left pads: prompt length less what is not padding"
    )
    prefill = MethodSpec(
        name="prefill",
        file=PROGRAM_FILE,
        inputs=(
            TensorSpec(
                name="inputs_embeds",
                shape=(1, prompt, width),
                dtype="float32",
                layout=EMBEDDING_LAYOUT,
                about="[left pads][prompt head][image features][prompt tail]; the pads' values do not matter",
            ),
            start,
            *([] if grid is None else [_positions(grid, prompt)]),
        ),
        outputs=(_logits(source),),
        about="fills the key-value caches, which decode shares; tokens are dropped inside",
    )
    example = (torch.zeros(1, prompt, width), torch.tensor([1]))
    if grid is not None:
        example = (*example, torch.zeros(3, prompt, dtype=torch.int64))
    decode = MethodSpec(
        name="decode",
        file=PROGRAM_FILE,
        inputs=(
            _integer("token", shape=(1, 1), layout="batch, token", high=vocabulary - 1, about="the last token"),
            _integer(
                "position",
                shape=(1,),
                layout="scalar",
                high=prompt + source.new_tokens - 1,
                about=f"{prompt} for the first generated token, then one more each step",
            ),
            start.model_copy(update={"about": "the same as in prefill"}),
        ),
        outputs=(_logits(source),),
    )
    about = "the prompt padded on the left to its longest; one call for head and tail"
    return {
        "token_embedding": Method(
            module=TokenEmbedding(source.model),
            inputs=(torch.zeros(1, text, dtype=torch.int64),),
            spec=_embedding_spec(source, text, about),
        ),
        "prefill": Method(module=Prefill(language), inputs=example, spec=prefill),
        "decode": Method(
            module=Decode(language),
            inputs=(torch.tensor([[0]]), torch.tensor([prompt]), torch.tensor([1])),
            spec=decode,
        ),
    }


def _stock(source: Source) -> dict[str, Method]:
    context = context_length(source)
    length = DynamicSize(min=1, max=context - 1)
    rows = torch.export.Dim("rows", min=length.min, max=length.max)
    decoder = MethodSpec(
        name="text_decoder",
        file=PROGRAM_FILE,
        inputs=(
            TensorSpec(name="embeds", shape=(1, length, _width(source)), dtype="float32", layout=EMBEDDING_LAYOUT),
            _integer(
                "position", shape=(1,), layout="scalar", high=context - 1, about="position of the first row of embeds"
            ),
        ),
        outputs=(_logits(source),),
        about="writes the key-value caches at `position`; each segment of the prompt, then each generated token",
    )
    return {
        "token_embedding": Method(
            module=TokenEmbedding(source.model),
            inputs=(torch.zeros(1, 3, dtype=torch.int64),),
            spec=_embedding_spec(source, length, "any segment of text"),
            dynamic_shapes=({1: rows},),
        ),
        "text_decoder": Method(
            module=TextDecoder(source.model, context=context, options=EXECUTORCH),
            inputs=(torch.zeros(1, 3, _width(source)), torch.tensor([0])),
            spec=decoder,
            dynamic_shapes=({1: rows}, None),
        ),
    }
