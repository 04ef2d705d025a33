"""Running a bundle from Python: what an application does, in a few lines. Imports nothing of comp-edge's pruner.

runner = ScheduledRunner("bundle/scheduled")
answer = runner.generate(pixel_values, "what colour is the 7?")
answer.text, answer.tokens
"""

from __future__ import annotations

import ctypes
import os
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from export.bundle import Bundle, BundleError
from export.positions import ImageGrid, prompt_positions


@dataclass(frozen=True)
class Generation:
    """An answer: its tokens (end-of-sequence included, if it came), their text, and the logits each was taken from."""

    tokens: tuple[int, ...]
    text: str
    logits: tuple[Tensor, ...]


@contextmanager
def silenced_output() -> Iterator[None]:
    """Discard what C++ code prints, on stdout (answers and statistics, which would break `--json`) and on stderr (notes).

    Errors come as exceptions and are not affected.
    """
    libc = ctypes.CDLL(None)

    def flush() -> None:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        # C's own buffer must be empty whenever the descriptors change.
        libc.fflush(None)

    flush()
    saved, null = [os.dup(1), os.dup(2)], os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    try:
        yield
    finally:
        flush()
        for descriptor, copy in zip((1, 2), saved, strict=True):
            os.dup2(copy, descriptor)
            os.close(copy)
        os.close(null)


class Engine(Protocol):
    """Executes methods of a program; state between calls (caches) is the engine's."""

    def call(self, method: str, *inputs: Tensor) -> Tensor:
        """Run a method on inputs in the manifest's order; its first output."""

    def call_all(self, method: str, *inputs: Tensor) -> Sequence[Tensor]:
        """The same; all its outputs."""


class ExecuTorchEngine:
    """A .pte through `executorch.runtime.Runtime`, whose methods share the memory of the caches."""

    def __init__(self, path: str | Path) -> None:
        try:
            with silenced_output():
                from executorch.runtime import Runtime

                # The program must outlive its methods.
                self.program = Runtime.get().load_program(Path(path))
        except (OSError, RuntimeError) as error:
            raise BundleError(f"program {str(path)!r} cannot be loaded: {str(error).splitlines()[0]}.") from None
        self._methods: dict[str, Any] = {}

    def method(self, name: str) -> Any:
        """The loaded method.

        Raises:
            BundleError: the program has no such method, or the runtime lacks an operator of it.
        """
        if name not in self._methods:
            if name not in self.program.method_names:
                have = ", ".join(sorted(self.program.method_names))
                raise BundleError(f"the program has no method {name!r}; it has {have}.")
            try:
                with silenced_output():
                    self._methods[name] = self.program.load_method(name)
            except RuntimeError as error:
                raise BundleError(f"method {name!r} cannot be loaded: {str(error).splitlines()[0]}.") from None
        return self._methods[name]

    def call(self, method: str, *inputs: Tensor) -> Tensor:
        return self.call_all(method, *inputs)[0]

    def call_all(self, method: str, *inputs: Tensor) -> Sequence[Tensor]:
        return self.method(method).execute(inputs)


class Runner(ABC):
    """What both profiles share: the tokenizer, the prompt, the greedy loop."""

    profile = ""

    def __init__(self, bundle: str | Path | Bundle, *, engine: Engine | None = None) -> None:
        from tokenizers import Tokenizer

        self.bundle = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
        manifest = self.bundle.manifest
        if self.profile and manifest.profile != self.profile:
            raise BundleError(
                f"bundle {str(self.bundle.folder)!r} has profile {manifest.profile!r}; this runner takes {self.profile!r}."
            )
        self.spec = manifest.prompt
        self.tokenizer = Tokenizer.from_file(str(self.bundle.path("tokenizer.json")))
        self.engine = engine or ExecuTorchEngine(self.bundle.path(manifest.methods[0].file))

    def prompt_ids(self, question: str) -> list[int]:
        """Token ids of the prompt, the image token once."""
        text = self.spec.template.replace("{question}", question)
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def segments(self, ids: Sequence[int]) -> tuple[list[int], list[int]]:
        """The prompt's tokens before and after the image.

        Raises:
            BundleError: not exactly one image token, or more text than the program has room for.
        """
        if list(ids).count(self.spec.image_token_id) != 1:
            raise BundleError(f"a prompt must contain {self.spec.image_token!r} exactly once.")
        if len(ids) - 1 > self.spec.max_text_tokens:
            raise BundleError(
                f"the prompt has {len(ids) - 1} text tokens; the program has room for {self.spec.max_text_tokens}."
            )
        at = list(ids).index(self.spec.image_token_id)
        return list(ids[:at]), list(ids[at + 1 :])

    @abstractmethod
    def prefill(self, pixel_values: Tensor, ids: Sequence[int]) -> Tensor:
        """Image and prompt in; logits [1, vocabulary] of the first token out. Starts a new request."""

    @abstractmethod
    def step(self, token: int) -> Tensor:
        """One generated token in; logits [1, vocabulary] of the next out."""

    @abstractmethod
    def rewind(self) -> None:
        """Forget the generated tokens: the next `step` is again the first after the prompt."""

    def generate(self, pixel_values: Tensor, question: str, *, max_new_tokens: int | None = None) -> Generation:
        """Answer greedily.

        Args:
            pixel_values: [3, H, W] or [1, 3, H, W], prepared as the manifest's `image` says.

        Raises:
            BundleError: the prompt is longer than the program has room for.
        """
        limit = min(max_new_tokens or self.spec.max_new_tokens, self.spec.max_new_tokens)
        if pixel_values.ndim == 3:
            pixel_values = pixel_values[None]
        logits = [self.prefill(pixel_values, self.prompt_ids(question))]
        tokens = [int(logits[0].argmax())]
        while len(tokens) < limit and tokens[-1] not in self.spec.eos_token_ids:
            logits.append(self.step(tokens[-1]))
            tokens.append(int(logits[-1].argmax()))
        words = [token for token in tokens if token not in self.spec.eos_token_ids]
        return Generation(tokens=tuple(tokens), text=self.tokenizer.decode(words), logits=tuple(logits))


class ScheduledRunner(Runner):
    """Profile `scheduled`: the prompt is padded on the left to the schedule's length and prefilled at once."""

    profile = "scheduled"

    def __init__(self, bundle: str | Path | Bundle, *, engine: Engine | None = None) -> None:
        super().__init__(bundle, engine=engine)
        spec = self.bundle.manifest.method("prefill").inputs[0]
        # Rows before `start` are ignored, so one buffer serves every request.
        self._sequence = torch.zeros(*spec.shape)
        self._prompt = self._sequence.shape[1]
        self._start = torch.zeros(1, dtype=torch.int64)
        self._position = torch.zeros(1, dtype=torch.int64)
        grid, rows = self.spec.grid, self.spec.image_tokens
        self._grid = None if grid is None else ImageGrid(*grid, rows)

    def prefill(self, pixel_values: Tensor, ids: Sequence[int]) -> Tensor:
        head, tail = self.segments(ids)
        image = self.spec.image_tokens
        start = self._prompt - image - len(head) - len(tail)
        # One embedding call of static length: [pads, head, tail].
        padded = [self.spec.pad_token_id] * start + head + tail
        text = self.engine.call("token_embedding", torch.tensor([padded]))
        after = start + len(head)
        self._sequence[:, :after] = text[:, :after]
        features, *kept = self.engine.call_all("vision_encoder", pixel_values)
        self._sequence[:, after : after + image] = features
        self._sequence[:, after + image :] = text[:, after:]
        self._start[0] = start
        self.rewind()
        if self._grid is None:
            return self.engine.call("prefill", self._sequence, self._start)
        # Which tokens were kept is told where some were dropped.
        places = kept[0][0] if kept else None
        positions = prompt_positions(self._grid, slots=self._prompt, first=after, kept=places)
        return self.engine.call("prefill", self._sequence, self._start, positions)

    def rewind(self) -> None:
        self._position[0] = self._prompt

    def step(self, token: int) -> Tensor:
        logits = self.engine.call("decode", torch.tensor([[token]]), self._position, self._start)
        self._position += 1
        return logits


class SegmentRunner(Runner):
    """Profile `stock` method by method, as the stock runner calls them: each segment of the prompt alone."""

    profile = "stock"

    def _advance(self, embeddings: Tensor) -> Tensor:
        logits = self.engine.call("text_decoder", embeddings, torch.tensor([self._position]))
        self._position += embeddings.shape[1]
        return logits

    def prefill(self, pixel_values: Tensor, ids: Sequence[int]) -> Tensor:
        head, tail = self.segments(ids)
        self._position = 0
        if head:
            self._advance(self.engine.call("token_embedding", torch.tensor([head])))
        logits = self._advance(self.engine.call("vision_encoder", pixel_values))
        if tail:
            logits = self._advance(self.engine.call("token_embedding", torch.tensor([tail])))
        self._prompt = self._position
        return logits

    def rewind(self) -> None:
        self._position = self._prompt

    def step(self, token: int) -> Tensor:
        return self._advance(self.engine.call("token_embedding", torch.tensor([[token]])))


class StockRunner:
    """ExecuTorch's own `MultimodalRunner` (the C++ code of the Android and iOS applications) on a `stock` bundle."""

    def __init__(self, bundle: str | Path | Bundle) -> None:
        from executorch.extension.llm.runner import MultimodalRunner

        self.bundle = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
        manifest = self.bundle.manifest
        if manifest.profile != "stock":
            raise BundleError(f"ExecuTorch's MultimodalRunner takes profile 'stock', not {manifest.profile!r}.")
        model, tokenizer = self.bundle.path(manifest.methods[0].file), self.bundle.path("tokenizer.json")
        with silenced_output():
            self._runner = MultimodalRunner(str(model), str(tokenizer), None)

    def matches(self, pixel_values: Tensor, question: str, expected: Sequence[int], tokenizer: Any) -> bool | None:
        """Whether the runner answers with the text of the `expected` tokens (it delivers text, not tokens).

        None where that cannot be told: an expected token is part of a character, which the Python binding cannot
        deliver, or none of the tokenizer's, as a model with a larger vocabulary may generate it.
        """
        ends = {tokenizer.id_to_token(token) for token in self.bundle.manifest.prompt.eos_token_ids}
        pieces = [tokenizer.decode([token], skip_special_tokens=False) for token in expected]
        unknown = any(tokenizer.id_to_token(token) is None for token in expected)
        if unknown or any("\ufffd" in piece for piece in pieces):
            return None
        try:
            got = self.generate(pixel_values, question)
        except UnicodeDecodeError:
            return False
        # The runner may or may not deliver the text of the end-of-sequence token.
        return "".join(p for p in got if p not in ends) == "".join(p for p in pieces if p not in ends)

    def generate(self, pixel_values: Tensor, question: str, *, max_new_tokens: int | None = None) -> list[str]:
        """Answer greedily; the text of each generated token, as the runner delivers them.

        The Python binding decodes each token alone, so an answer with a token that is not whole UTF-8 (a byte of a
        longer character) raises UnicodeDecodeError.

        Args:
            pixel_values: [3, H, W] or [1, 3, H, W].
        """
        from executorch.extension.llm.runner import GenerationConfig, make_image_input, make_text_input

        spec = self.bundle.manifest.prompt
        limit = min(max_new_tokens or spec.max_new_tokens, spec.max_new_tokens)
        head, tail = spec.template.replace("{question}", question).split(spec.image_token)
        inputs = [make_text_input(head)] if head else []
        inputs += [make_image_input(pixel_values.reshape(pixel_values.shape[-3:]).contiguous()), make_text_input(tail)]
        pieces: list[str] = []
        with silenced_output():
            self._runner.reset()
            self._runner.generate(
                inputs, GenerationConfig(max_new_tokens=limit, temperature=0.0, echo=False), pieces.append
            )
        return pieces


def open_runner(bundle: str | Path | Bundle, *, engine: Engine | None = None) -> ScheduledRunner | SegmentRunner:
    """The Python runner for a bundle's profile.

    Raises:
        BundleError: the bundle cannot be read, or no runner knows its profile.
    """
    bundle = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
    for kind in (ScheduledRunner, SegmentRunner):
        if bundle.manifest.profile == kind.profile:
            return kind(bundle, engine=engine)
    raise BundleError(f"no runner knows profile {bundle.manifest.profile!r}; known: scheduled, stock.")
