"""Which methods a model has that reads an image and a whole text, and what the manifest says of them.

CLIP, SigLIP and SigLIP 2 become two towers that know nothing of each other. BLIP's retrieval model becomes a vision encoder and
a matcher that reads a text beside an image; where it answers or captions, a prefill and a decode step.

A new family is a function here and a line in `METHODS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from comp_edge.errors import InputError
from comp_edge.families import family_of
from comp_edge.families.blip_parts import cross_layer, text_layer
from comp_edge.families.clip import LEGACY_EOS
from export.bundle import MethodSpec, TensorSpec
from export.graph.answers import AnswerDecode, AnswerDecoder, AnswerPrefill, CaptionPrefill
from export.graph.options import GraphOptions
from export.graph.pooled import AttentionPool, ImageEncoder, ImageTokens, Projection
from export.graph.text import EndOfText, Matcher, NoPadding, Padding, TextEmbedding, TextEncoder, TextTower
from export.graph.vision import Tower

# What a model does with an image and a text: compare an embedding of each, judge both together, answer, or go on writing.
Kind = Literal["towers", "matcher", "answers", "captions"]
Size = tuple[int, int]


@dataclass(frozen=True)
class Shape:
    """What a program is made for, beside the model.

    Attributes:
        tokens: the plan's token schedule of each stream.
        size: height and width of the images in pixels.
        pad, eos: ids of the tokenizer.
        new_tokens: that may be generated.
    """

    tokens: Mapping[str, Sequence[int]]
    size: Size
    pad: int
    eos: int
    new_tokens: int

    @property
    def text(self) -> int:
        """Tokens of a padded text."""
        return self.tokens["language"][0]


@dataclass(frozen=True)
class Port:
    """An input or output; `high` is the largest value of an integer."""

    name: str
    shape: tuple[int, ...]
    layout: str
    about: str = ""
    integer: bool = False
    high: int = 0


@dataclass(frozen=True)
class Part:
    """One method: its module, and what its inputs and outputs are called and hold."""

    module: nn.Module
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    about: str

    def example(self) -> tuple[Tensor, ...]:
        """Zeros of the right shapes."""
        return tuple(torch.zeros(*port.shape, dtype=torch.int64 if port.integer else None) for port in self.inputs)


def kind_of(model: Any) -> Kind:
    """What a model without placeholders does."""
    if hasattr(model, "itm_head"):
        return "matcher"
    if not hasattr(model, "text_decoder"):
        return "towers"
    return "answers" if hasattr(model, "text_encoder") else "captions"


def parts_of(model: Any, shape: Shape, options: GraphOptions) -> dict[str, Part]:
    """The methods of a model whose layers are already shrunk.

    Raises:
        InputError: the model, or the schedule, has no form here.
    """
    kind = model.config.model_type
    if kind not in METHODS:
        raise InputError(f"model type {kind!r} has no encoders that can be exported; supported: {', '.join(METHODS)}.")
    return {name: _evaluating(part) for name, part in METHODS[kind](model, shape, options).items()}


def _evaluating(part: Part) -> Part:
    part.module.eval()
    return part


# ---- families


def _clip(model: Any, shape: Shape, options: GraphOptions) -> dict[str, Part]:
    text, vision = model.text_model, model.vision_model
    eos = text.eos_token_id
    if eos == LEGACY_EOS and shape.eos != LEGACY_EOS:
        # By that rule the text ends at its largest id.
        if shape.eos != model.config.text_config.vocab_size - 1:
            raise InputError(
                f"eos_token_id {eos} means that a text ends at its largest id, which the tokenizer's {shape.eos} is not; set "
                "the text config's eos_token_id to the tokenizer's."
            )
        eos = shape.eos
    tower = Tower(model, shape.tokens["vision"], options, reads="class", final_norm=False, size=shape.size)
    image = ImageEncoder(tower, Projection(vision.post_layernorm, model.visual_projection, options))
    words = _text_tower(model, shape, options, marks=EndOfText(eos, shape.text), reading="end", causal=True)
    pool = Projection(text.final_layer_norm, model.text_projection, options)
    return _towers(model, shape, image, TextEncoder(words, pool), widths=(model.projection_dim, model.projection_dim))


def _siglip(model: Any, shape: Shape, options: GraphOptions) -> dict[str, Part]:
    text, vision = model.text_model, model.vision_model
    if not getattr(vision, "use_head", True):
        raise InputError("vision_use_head false cannot be exported: without its head the tower has no embedding.")
    tower = Tower(model, shape.tokens["vision"], options, final_norm=False, size=shape.size)
    image = ImageEncoder(tower, AttentionPool(vision.head, vision.post_layernorm, options))
    words = _text_tower(model, shape, options, marks=NoPadding(), reading="final")
    pool = Projection(text.final_layer_norm, text.head, options)
    widths = vision.config.hidden_size, text.head.out_features
    return _towers(model, shape, image, TextEncoder(words, pool), widths=widths)


def _text_tower(model: Any, shape: Shape, options: GraphOptions, **how: Any) -> TextTower:
    embeddings, stream = model.text_model.embeddings, family_of(model).streams(model)["language"]
    embedding = TextEmbedding(
        embeddings.token_embedding, embeddings.position_embedding, length=shape.text, options=options
    )
    return TextTower(embedding, stream.layers, shape.tokens["language"], options, **how)


def _towers(model: Any, shape: Shape, image: nn.Module, text: nn.Module, *, widths: tuple[int, int]) -> dict[str, Part]:
    """Args:
    widths: of the image's and of the text's embedding.
    """
    embedding = {"layout": "batch, channel", "about": "not normalized"}
    return {
        "image_encoder": Part(
            module=image,
            inputs=(_pixels(shape),),
            outputs=(Port("image_embeds", (1, widths[0]), **embedding),),
            about="image tower, pooled and projected as get_image_features does; tokens are dropped inside",
        ),
        "text_encoder": Part(
            module=text,
            inputs=(_ids(shape, model.text_model.embeddings.token_embedding),),
            outputs=(Port("text_embeds", (1, widths[1]), **embedding),),
            about="text tower, pooled and projected as get_text_features does; tokens are dropped inside",
        ),
    }


def _blip(model: Any, shape: Shape, options: GraphOptions) -> dict[str, Part]:
    tower = Tower(model, shape.tokens["vision"], options, size=shape.size)
    tokens, width = shape.tokens["vision"][-1], model.config.vision_config.hidden_size
    features = Port("image_features", (1, tokens, width), "batch, token, channel")
    parts = {
        "vision_encoder": Part(
            module=ImageTokens(tower),
            inputs=(_pixels(shape),),
            outputs=(features,),
            about="image tower; tokens are dropped inside, and those that are left are what the text attends to",
        )
    }
    kind = kind_of(model)
    if kind == "matcher":
        head = Matcher(_question(model, shape, options, reading="first"), model.itm_head)
        scores = Port("itm_scores", (1, 2), "batch, (no match, match)", about="logits; softmax gives probabilities")
        ids = _ids(shape, model.text_encoder.embeddings.word_embeddings)
        about = "reads a text beside an image: how well they match; tokens of the text are dropped inside"
        return parts | {"matcher": Part(head, (ids, features), (scores,), about)}
    return parts | _writer(model, shape, options, features, captions=kind == "captions")


def _question(model: Any, shape: Shape, options: GraphOptions, *, reading: Literal["first", "all"]) -> TextTower:
    streams, embeddings = family_of(model).streams(model), model.text_encoder.embeddings
    embedding = TextEmbedding(
        embeddings.word_embeddings,
        embeddings.position_embeddings,
        length=shape.text,
        options=options,
        norm=embeddings.LayerNorm,
    )
    return TextTower(
        embedding,
        streams["language"].layers,
        shape.tokens["language"],
        options,
        marks=Padding(shape.pad),
        reading=reading,
        cross=streams["cross"].layers,
    )


def _writer(model: Any, shape: Shape, options: GraphOptions, features: Port, *, captions: bool) -> dict[str, Part]:
    layers = model.text_decoder.bert.encoder.layer
    decoder = AnswerDecoder(
        model.text_decoder,
        [text_layer(layer) for layer in layers],
        [cross_layer(layer) for layer in layers],
        prompt=shape.text if captions else 1,
        new_tokens=shape.new_tokens,
        options=options,
    )
    words = model.text_decoder.get_input_embeddings()
    logits = Port("logits", (1, decoder.head.out_features), "batch, vocabulary", about="of the token that follows")
    keys, padding = features.shape[1], ()
    if captions:
        prefill: nn.Module = CaptionPrefill(decoder, shape.pad)
        about = "what the caption begins with; fills the key-value caches, which decode shares"
    else:
        keys = shape.tokens["language"][-1]
        prefill = AnswerPrefill(_question(model, shape, options, reading="all"), decoder)
        padding = (
            Port("padding", (1, 1, keys), "batch, row, token", about="1 for padding that the question was left"),
        )
        about = "the question beside the image; the answer begins with a decode of the start token at position 0"
    handed = padding + tuple(
        port
        for index in decoder.attending
        for heads, size in [(decoder.cross[index].attention.heads, decoder.cross[index].attention.head_dim)]
        for port in (
            Port(f"cross_keys_{index}", (heads, size, keys), "head, channel, token", about="for decode"),
            Port(f"cross_values_{index}", (heads, keys, size), "head, token, channel", about="for decode"),
        )
    )
    last = Port("token", (1, 1), "batch, token", "the last token", integer=True, high=words.num_embeddings - 1)
    place = Port(
        "position", (1,), "scalar", "of that token in text and answer", integer=True, high=decoder.capacity - 1
    )
    decode = AnswerDecode(decoder, pads=bool(padding))
    return {
        "prefill": Part(prefill, (_ids(shape, words), features), (*((logits,) if captions else ()), *handed), about),
        "decode": Part(decode, (last, place, *handed), (logits,), "one more token, with what prefill handed on"),
    }


METHODS: dict[str, Callable[[Any, Shape, GraphOptions], dict[str, Part]]] = {
    "clip": _clip,
    "siglip": _siglip,
    "siglip2": _siglip,
    "blip": _blip,
}


def _pixels(shape: Shape) -> Port:
    return Port(
        "pixel_values", (1, 3, *shape.size), "batch, channel (RGB), height, width", about="prepared as 'image' says"
    )


def _ids(shape: Shape, words: nn.Embedding) -> Port:
    about = "tokenized and padded as 'text' says"
    return Port("input_ids", (1, shape.text), "batch, token", about, integer=True, high=words.num_embeddings - 1)


# ---- the manifest


def method_spec(
    name: str,
    part: Part,
    *,
    file: str,
    floats: Literal["float32", "float16"],
    integers: Literal["int64", "int32"],
    pixels: tuple[float, float],
    function: str | None = None,
    states: Sequence[TensorSpec] = (),
) -> MethodSpec:
    """What the manifest says of a method.

    Args:
        pixels: smallest and largest value of an image.
    """

    def port_spec(port: Port) -> TensorSpec:
        limits = (0, port.high) if port.integer else pixels if port.name == "pixel_values" else None
        return TensorSpec(
            name=port.name,
            shape=port.shape,
            dtype=integers if port.integer else floats,
            layout=port.layout,
            range=limits,
            about=port.about,
        )

    return MethodSpec(
        name=name,
        file=file,
        function=function,
        inputs=tuple(map(port_spec, part.inputs)),
        outputs=tuple(map(port_spec, part.outputs)),
        states=tuple(states),
        about=part.about,
    )
