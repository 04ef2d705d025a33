"""The functions of the packages: which modules they are made of, and what the manifest says of them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from comp_edge.errors import InputError
from export.bundle import MethodSpec, TensorSpec
from export.graph import COREML, Decode, LanguageModel, Prefill, TokenEmbedding, VisionEncoder
from export.positions import positions_about
from export.reference import image_spec, pixel_range
from export.source import Source

Precision = Literal["fp16", "fp32"]
Selection = Literal["topk", "rank"]
PRECISIONS: tuple[Precision, ...] = ("fp16", "fp32")
DTYPES = {"fp16": "float16", "fp32": "float32"}
EMBEDDING_LAYOUT = "batch, token, channel"
# Core ML calls the only function of a package this.
ONLY_FUNCTION = "main"
DEFAULT_LANGUAGE_FUNCTION = "decode"
# Positions are compared as floats: integers above this are not exact in fp16.
LARGEST_FP16_POSITION = 2048


@dataclass(frozen=True)
class Modules:
    """The deployment form of a model: a module per method, `prefill` and `decode` sharing one `language`."""

    by_method: dict[str, nn.Module]
    language: LanguageModel
    selection: Selection

    @property
    def vision(self) -> VisionEncoder:
        """The image encoder."""
        return self.by_method["vision_encoder"]


def build_modules(source: Source, *, selection: Selection) -> Modules:
    """The modules that become functions.

    The token embedding is a function of its own (its table is stored once, `decode` reads the same): an application embeds
    the text of a prompt in one call and puts the image features between, as in the ExecuTorch bundle's `scheduled` profile.

    Raises:
        InputError: the model has no deployment form, or does not fit its positions.
    """
    options = dataclasses.replace(COREML, selection=selection)
    tokens = source.tokens["language"]
    language = LanguageModel(source.model, tokens, new_tokens=source.new_tokens, options=options, grid=source.grid)
    by_method = {
        "vision_encoder": VisionEncoder(source.model, source.tokens["vision"], options, size=source.image_size),
        "token_embedding": TokenEmbedding(source.model),
        "prefill": Prefill(language),
        "decode": Decode(language),
    }
    return Modules(
        by_method={name: module.eval() for name, module in by_method.items()}, language=language, selection=selection
    )


def check_precision(modules: Modules, precision: Precision) -> None:
    """Refuse what a precision cannot express.

    Raises:
        InputError: more positions than fp16 tells apart.
    """
    if precision != "fp16":
        return
    capacity = modules.language.capacity
    if capacity > LARGEST_FP16_POSITION:
        raise InputError(
            f"prompt and answer need {capacity} positions, and fp16 tells at most {LARGEST_FP16_POSITION} apart; shorten "
            "them or export with --precision fp32."
        )
    if modules.vision.says_kept and (tokens := modules.vision.places.shape[1]) > LARGEST_FP16_POSITION:
        raise InputError(
            f"the image has {tokens} tokens to choose from, and fp16 tells at most {LARGEST_FP16_POSITION} apart; give a "
            "smaller --image-size or export with --precision fp32."
        )


def package_name(part: Literal["vision", "language"], precision: Precision) -> str:
    """File name of a package."""
    return f"{part}_{precision}.mlpackage"


def method_specs(source: Source, modules: Modules, precision: Precision) -> dict[str, MethodSpec]:
    """What the manifest says of each method."""
    build = _Specs(source=source, modules=modules, precision=precision)
    specs = (build.vision_encoder(), build.token_embedding(), build.prefill(), build.decode())
    return {spec.name: spec for spec in specs}


def example_inputs(spec: MethodSpec) -> tuple[Tensor, ...]:
    """Inputs to trace a method with: fp32 and int32 zeros of the right shapes (every shape is static)."""
    return tuple(
        torch.zeros(*port.shape, dtype=torch.int32 if port.dtype == "int32" else torch.float32) for port in spec.inputs
    )


@dataclass(frozen=True)
class _Specs:
    source: Source
    modules: Modules
    precision: Precision

    def vision_encoder(self) -> MethodSpec:
        image = image_spec(self.source)
        pixels = self._floats(
            "pixel_values",
            (1, 3, image.height, image.width),
            "batch, channel (RGB), height, width",
            range=pixel_range(image),
            about="prepared as 'image' says",
        )
        return MethodSpec(
            name="vision_encoder",
            file=package_name("vision", self.precision),
            function=ONLY_FUNCTION,
            inputs=(pixels,),
            outputs=(
                self._floats("image_features", (1, self.source.image_tokens, self._width), EMBEDDING_LAYOUT),
                *([self._kept] if self.modules.vision.says_kept else []),
            ),
            about="image tower and connector; tokens are dropped inside",
        )

    def token_embedding(self) -> MethodSpec:
        text = self.source.text_tokens
        ids = self._integers(
            "token_ids",
            (1, text),
            "batch, token",
            self._vocabulary - 1,
            "text of the prompt without the image, padded on the left to its longest; one call for head and tail",
        )
        return self._language(
            "token_embedding", (ids,), self._floats("embeddings", (1, text, self._width), EMBEDDING_LAYOUT)
        )

    def prefill(self) -> MethodSpec:
        rows = self._floats(
            "inputs_embeds",
            (1, self.modules.language.prompt, self._width),
            EMBEDDING_LAYOUT,
            about="[left pads][prompt head][image features][prompt tail]; the pads' values do not matter",
        )
        start = self._start("left pads: prompt length less what is not padding")
        return self._language(
            "prefill",
            (rows, start, *self._positions),
            self._logits,
            states=self._states,
            about="fills the key-value caches, whatever was in them; tokens are dropped inside",
        )

    def decode(self) -> MethodSpec:
        language = self.modules.language
        token = self._integers("token", (1, 1), "batch, token", self._vocabulary - 1, "the last token")
        position = self._integers(
            "position",
            (1,),
            "scalar",
            language.capacity - 1,
            f"{language.prompt} for the first generated token, then one more each step",
        )
        return self._language(
            "decode",
            (token, position, self._start("the same as in prefill")),
            self._logits,
            states=self._states,
            about="the package's default function; continues from the state that prefill filled",
        )

    def _language(
        self,
        name: str,
        inputs: tuple[TensorSpec, ...],
        output: TensorSpec,
        *,
        states: tuple[TensorSpec, ...] = (),
        about: str = "",
    ) -> MethodSpec:
        return MethodSpec(
            name=name,
            file=package_name("language", self.precision),
            function=name,
            inputs=inputs,
            outputs=(output,),
            states=states,
            about=about,
        )

    @property
    def _width(self) -> int:
        return self.source.model.config.text_config.hidden_size

    @property
    def _vocabulary(self) -> int:
        return self.source.model.config.text_config.vocab_size

    @property
    def _logits(self) -> TensorSpec:
        about = "of the token that follows; greedy decoding takes the largest"
        return self._floats("logits", (1, self._vocabulary), "batch, vocabulary", about=about)

    @property
    def _states(self) -> tuple[TensorSpec, ...]:
        """The caches: lengths differ by layer. Core ML keeps states in fp16 only, whatever the package's precision."""
        found = []
        for name, buffer in self.modules.language.named_buffers():
            kind = name.split("_")[0]
            if kind in ("keys", "values") and name.split("_")[-1].isdigit():
                layout = "group, channel, entry" if kind == "keys" else "group, entry, channel"
                shape = tuple(buffer.shape)
                # The name that the buffer has within `Prefill` and `Decode`, which the front end keeps.
                found.append(TensorSpec(name=f"language_{name}", shape=shape, dtype="float16", layout=layout))
        return tuple(found)

    @property
    def _kept(self) -> TensorSpec:
        return self._integers(
            "kept",
            (1, self.source.image_tokens),
            "batch, token",
            self.source.dense_image_tokens - 1,
            "which tokens of the dense image the rows are, counted row by row: positions need them",
        )

    @property
    def _positions(self) -> list[TensorSpec]:
        """The input of `prefill` that a model with positions in two dimensions has."""
        language = self.modules.language
        if (grid := language.grid) is None:
            return []
        shape, high = (3, language.prompt), language.prompt + grid.after - 1
        return [self._integers("positions", shape, "time, height and width; slot", high, positions_about(grid))]

    def _floats(self, name: str, shape: tuple[int, ...], layout: str, **more: Any) -> TensorSpec:
        return TensorSpec(name=name, shape=shape, dtype=DTYPES[self.precision], layout=layout, **more)

    def _integers(self, name: str, shape: tuple[int, ...], layout: str, high: int, about: str) -> TensorSpec:
        return TensorSpec(name=name, shape=shape, dtype="int32", layout=layout, range=(0, high), about=about)

    def _start(self, about: str) -> TensorSpec:
        return self._integers("start", (1,), "scalar", self.source.text_tokens, about)
