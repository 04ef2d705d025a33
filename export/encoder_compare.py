"""Is a program with encoders right? What a backend's verification compares, whatever ran the program."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from export.bundle import Bundle, TextGolden, largest
from export.encoder_runner import EncoderRunner, Response
from export.graph.select import watch_cuts

INPUTS = ("pixel_values", "input_ids")
# Scores are sums of probabilities of order 1; two programs' scores differ by some 1e-6.
AMBIGUOUS_GAP = 1e-5
# How far the outputs of one request may move between fp32 and fp64, relative to the largest where that is above 1.
AMBIGUOUS_ROUNDING = 1e-5


@dataclass
class Comparison:
    """Responses against a golden reference; `errors` by output, over the requests that count.

    Attributes:
        matched: per request whether the generated tokens are equal; without any, whether the errors are in the tolerance.
    """

    golden: TextGolden
    tolerance: float
    errors: dict[str, float] = field(default_factory=dict)
    matched: list[bool] = field(default_factory=list)

    def __post_init__(self) -> None:
        names = [name for name in self.golden.tensors if name not in INPUTS]
        self.errors = dict.fromkeys([*names, *(["logits"] if self.golden.tokens else [])], 0.0)

    def add(self, response: Response, index: int, *, counts: bool) -> float:
        """Compare one response; logits as long as the tokens agree, and those after the last common one.

        Returns:
            its largest error, whether it counts or not.
        """
        found = {name: difference(response.tensors[name][0], self.golden.tensors[name][index]) for name in self._once}
        if self.golden.tokens:
            expected = self.golden.tokens[index]
            count = min(common(response.tokens, expected) + 1, len(response.logits), len(expected))
            found["logits"] = difference(torch.cat(response.logits[:count]), self.golden.logits[index][:count])
            self.matched.append(response.tokens == expected)
        else:
            self.matched.append(largest(found.values()) <= self.tolerance)
        if counts:
            self.errors = {name: largest((self.errors[name], error)) for name, error in found.items()}
        return largest(found.values())

    @property
    def _once(self) -> list[str]:
        return [name for name in self.errors if name != "logits"]

    @property
    def error(self) -> float:
        """The largest error of all outputs."""
        return largest(self.errors.values())

    def failures(self) -> list[str]:
        """A sentence's part for each output that is not in the tolerance; a NaN is not."""
        return [
            f"{name} differ by {error:.2e} from the reference; at most {self.tolerance:.0e} is right"
            for name, error in self.errors.items()
            if not error <= self.tolerance
        ]


def difference(a: Tensor, b: Tensor) -> float:
    """The largest difference; NaN for other shapes."""
    return (a.float() - b.float()).abs().max().item() if a.shape == b.shape else math.nan


def common(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the common beginning."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


@dataclass
class ModuleEngine:
    """The modules themselves, as `export.executorch.runner.Engine`."""

    modules: Mapping[str, nn.Module]

    def call(self, method: str, *inputs: Tensor) -> Tensor:
        """A method's first output."""
        return self.call_all(method, *inputs)[0]

    def call_all(self, method: str, *inputs: Tensor) -> tuple[Tensor, ...]:
        """All its outputs."""
        output = self.modules[method](*inputs)
        return output if isinstance(output, tuple) else (output,)


@torch.no_grad()
def unclear(bundle: Bundle, modules: Mapping[str, nn.Module], golden: TextGolden) -> list[bool]:
    """Per request, whether rounding alone decides what comes out, found by running the lowered modules eagerly.

    Either two tokens at the cut of a drop score alike within rounding, or the outputs (up to an answer's first token) move
    between fp32 and fp64. The modules are in fp64 afterwards.
    """
    runner = EncoderRunner(bundle, engine=ModuleEngine(modules))
    gaps, exact, rounded = [], [], []
    with watch_cuts(*modules.values()) as cuts:
        for index in range(len(golden.texts)):
            rounded.append(_outputs(runner, golden, index, torch.float32))
            gaps.append(min(cuts, default=math.inf))
            cuts.clear()
    # In turns, so that a large model is not held in both: its values are the same in either.
    for module in modules.values():
        module.double()
    exact = (_outputs(runner, golden, index, torch.float64) for index in range(len(golden.texts)))
    moved = [
        max((a - b).abs().max().item() / max(b.abs().max().item(), 1.0) for a, b in zip(few, many, strict=True))
        for few, many in zip(rounded, exact, strict=True)
    ]
    return [gap < AMBIGUOUS_GAP or moves > AMBIGUOUS_ROUNDING for gap, moves in zip(gaps, moved, strict=True)]


def _outputs(runner: EncoderRunner, golden: TextGolden, index: int, dtype: torch.dtype) -> list[Tensor]:
    pixels, ids = (golden.tensors[name][index : index + 1] for name in INPUTS)
    response = runner.respond(pixels.to(dtype), ids, max_new_tokens=1)
    named = [value for name, value in response.tensors.items() if name in golden.tensors and name not in INPUTS]
    return [*named, *response.logits]


def wrong_texts(runner: EncoderRunner, golden: TextGolden) -> list[str]:
    """Texts of which the bundle's own tokenizer and the manifest's rules make other ids than transformers does."""
    if not runner.tokenizes:
        return []
    return [
        text
        for index, text in enumerate(golden.texts)
        if not torch.equal(runner.input_ids(text)[0], golden.tensors["input_ids"][index])
    ]
