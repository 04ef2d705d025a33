"""Running a bundle that takes an image and a whole text: towers that embed, a matcher, or a decoder that answers.

runner = EncoderRunner("bundle/encoders")
found = runner.respond(pixel_values, runner.input_ids("a red house"))
found.tensors["image_embeds"], found.tensors["text_embeds"]

Imports nothing of comp-edge's pruner. Inputs and outputs go by name: what one method gives is what the next one takes.
"""

from __future__ import annotations

import string
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from export.bundle import Bundle, BundleError, MethodSpec
from export.executorch.runner import Engine, ExecuTorchEngine, Runner, open_runner

TOKENIZER = "tokenizer.json"
DECODE = "decode"


@dataclass(frozen=True)
class Response:
    """What a request gives.

    Attributes:
        tensors: inputs and outputs by name, of every method that is called once.
        tokens, logits: of the answer, where the bundle generates one: its tokens (the end included, if it came), and the
            [1, vocabulary] logits that each was taken from.
    """

    tensors: dict[str, Tensor]
    tokens: tuple[int, ...] = ()
    logits: tuple[Tensor, ...] = ()


class EncoderRunner:
    """A bundle whose manifest has a `text`; the image tower may run where no text is yet, and the other way round."""

    def __init__(self, bundle: str | Path | Bundle, *, engine: Engine | None = None) -> None:
        """Raises:
        BundleError: the bundle or its program cannot be read, or it takes prompts instead of texts.
        """
        self.bundle = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
        manifest = self.bundle.manifest
        if manifest.text is None:
            raise BundleError(
                f"bundle {str(self.bundle.folder)!r} takes prompts with an image in them, not whole texts."
            )
        self.text, self.answer = manifest.text, manifest.answer
        self.engine = engine or ExecuTorchEngine(self.bundle.path(manifest.methods[0].file))
        self._tokenizer: Any = None

    @property
    def once(self) -> tuple[MethodSpec, ...]:
        """The methods that a request calls once, in order."""
        return tuple(method for method in self.bundle.manifest.methods if method.name != DECODE)

    # ---- text

    @property
    def tokenizes(self) -> bool:
        """Whether the bundle has a tokenizer that this runner reads (not SigLIP's SentencePiece file)."""
        return self.bundle.path(TOKENIZER).is_file()

    def token_ids(self, text: str) -> list[int]:
        """Ids of a text, cut and with what stands around it, not padded.

        Raises:
            BundleError: the bundle has no `tokenizer.json`.
        """
        if self._tokenizer is None:
            if not self.tokenizes:
                raise BundleError(f"bundle {str(self.bundle.folder)!r} has no {TOKENIZER}.")
            from tokenizers import Tokenizer

            self._tokenizer = Tokenizer.from_file(str(self.bundle.path(TOKENIZER)))
            # The file may remember how somebody last called it.
            self._tokenizer.no_padding(), self._tokenizer.no_truncation()
        spec = self.text
        if spec.lowercase:
            text = text.lower()
        if spec.strip_punctuation:
            text = " ".join(text.translate(str.maketrans("", "", string.punctuation)).split())
        room = spec.max_tokens - len(spec.prefix) - len(spec.suffix)
        ids = self._tokenizer.encode(text, add_special_tokens=False).ids[:room]
        return [*spec.prefix, *ids, *spec.suffix]

    def input_ids(self, text: str) -> Tensor:
        """[1, max_tokens] int64, padded."""
        ids = self.token_ids(text)
        pads = [self.text.pad_token_id] * (self.text.max_tokens - len(ids))
        return torch.tensor([pads + ids if self.text.padding == "left" else ids + pads])

    # ---- requests

    def respond(self, pixel_values: Tensor, input_ids: Tensor, *, max_new_tokens: int | None = None) -> Response:
        """Run a whole request; answers are greedy.

        Args:
            pixel_values: [1, 3, H, W], prepared as the manifest's `image` says.
            input_ids: [1, max_tokens], see `input_ids`.
        """
        values = {"pixel_values": pixel_values, "input_ids": input_ids}
        for method in self.once:
            self.call(method, values)
        if self.answer is None:
            return Response(values)
        limit = min(max_new_tokens or self.answer.max_new_tokens, self.answer.max_new_tokens)
        logits, position = [self.first(values)], self.start(input_ids)
        tokens = [int(logits[0].argmax())]
        while len(tokens) < limit and tokens[-1] not in self.answer.eos_token_ids:
            logits.append(self.decode(values, tokens[-1], position))
            tokens.append(int(logits[-1].argmax()))
            position += 1
        return Response(values, tuple(tokens), tuple(logits))

    def call(self, method: MethodSpec, values: dict[str, Tensor]) -> None:
        """Run one method on values by name, and add what it gives to them."""
        outputs = self.engine.call_all(method.name, *[values[port.name] for port in method.inputs])
        values.update(zip((port.name for port in method.outputs), outputs, strict=True))

    def decode(self, values: Mapping[str, Tensor], token: int, position: int) -> Tensor:
        """[1, vocabulary] behind a token, in a request whose prefill gave `values`."""
        step = {**values, "token": torch.tensor([[token]]), "position": torch.tensor([position])}
        method = self.bundle.manifest.method(DECODE)
        return self.engine.call_all(DECODE, *[step[port.name] for port in method.inputs])[0]

    def first(self, values: Mapping[str, Tensor]) -> Tensor:
        """[1, vocabulary] of the answer's first token, in a request whose prefill gave `values`."""
        start = self.answer.start_token_id
        return values["logits"] if start is None else self.decode(values, start, 0)

    def start(self, input_ids: Tensor) -> int:
        """Position of the answer's first token."""
        if self.answer.start_token_id is not None:
            return 1
        return int((input_ids != self.text.pad_token_id).sum())


def runner_of(bundle: Bundle, *, engine: Engine | None = None) -> Runner | EncoderRunner:
    """The Python runner for any bundle.

    Raises:
        BundleError: the bundle cannot be read, or no runner knows its profile.
    """
    if bundle.manifest.text is not None:
        return EncoderRunner(bundle, engine=engine)
    return open_runner(bundle, engine=engine)
