"""Is the written program right? Loaded back and run on whole requests, against transformers' own `generate`."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from export.bundle import Bundle, Golden, Verification, largest
from export.executorch.runner import StockRunner, open_runner
from export.graph import EXECUTORCH, LanguageModel, Prefill, VisionEncoder
from export.graph.select import watch_cuts
from export.reference import Source, compact_embeddings

# fp32 programs of the same function differ by rounding alone.
TOLERANCE = 1e-4
# Scores are sums of probabilities of order 1; two programs' scores differ by some 1e-6.
AMBIGUOUS_GAP = 1e-5
# How far the logits of one request may move between fp32 and fp64. Most move by some 1e-6; where they move by more the
# model amplifies rounding, and an error says as much about the request as about the program.
AMBIGUOUS_ROUNDING = 1e-5


@dataclass(frozen=True)
class Outcome:
    """What a run over all requests found; `failures` is empty for a program that is right.

    `clear` are the requests whose drops are not ambiguous and whose tokens were equal: fit to be golden.
    """

    verification: Verification
    failures: tuple[str, ...]
    clear: tuple[int, ...]


def verify(folder: Path, golden: Golden, source: Source, *, progress: Callable[[], None] = lambda: None) -> Outcome:
    """Run the program of a bundle folder on the golden requests.

    Logits are compared for each generated token as long as the tokens agree, and the image features once. A request is
    ambiguous where rounding alone decides: a token drop has two candidates that score alike within it (the program may
    rightly keep the other one), or the model's own logits differ between fp32 and fp64. Errors of such requests are
    reported apart.

    Args:
        progress: called after each request.
    """
    bundle = Bundle.open(folder)
    runner = open_runner(bundle)
    stock = StockRunner(bundle) if bundle.manifest.profile == "stock" else None
    conditioning = _Conditioning(source)
    errors: dict[bool, list[float]] = {False: [], True: []}
    features_errors: list[float] = []
    matched = ambiguous = stock_matched = stock_skipped = 0
    wrong: list[str] = []
    clear: list[int] = []
    for index, question in enumerate(golden.questions):
        pixels = golden.pixel_values[index : index + 1]
        answer = runner.generate(pixels, question)
        expected = golden.tokens[index]
        agree = _common(answer.tokens, expected)
        # The logits after the last common token still come from the same inputs.
        count = min(agree + 1, len(answer.logits), len(expected))
        error = (torch.cat(answer.logits[:count]) - golden.logits[index][:count]).abs().max().item()
        gap, rounding = conditioning(pixels, question)
        unclear = gap < AMBIGUOUS_GAP or rounding > AMBIGUOUS_ROUNDING
        ambiguous += unclear
        errors[unclear].append(error)
        if not unclear:
            features = runner.engine.call("vision_encoder", pixels)[0]
            features_errors.append((features - golden.image_features[index]).abs().max().item())
        same = answer.tokens == expected
        if stock is not None:
            delivered = stock.matches(pixels, question, expected, runner.tokenizer)
            stock_skipped += delivered is None
            stock_matched += delivered is True
            same = same and delivered is not False
        matched += same
        if not same:
            wrong.append(question)
        elif not unclear:
            clear.append(index)
        progress()
    total = len(golden.questions)
    details = {"image_features_max_abs_error": largest(features_errors)}
    if stock is not None:
        details["multimodal_runner_matched"] = stock_matched
        # Its Python binding cannot deliver answers with parts of characters.
        details["multimodal_runner_skipped"] = stock_skipped
    verification = Verification(
        reference="transformers generate, fp32, eager, one request at a time",
        questions=total,
        matched=matched,
        tokens_equal=matched == total,
        max_abs_error=largest(errors[False]),
        tolerance=TOLERANCE,
        ambiguous=ambiguous,
        ambiguous_max_abs_error=largest(errors[True]) if ambiguous else None,
        details=details,
    )
    return Outcome(verification=verification, failures=tuple(_failures(verification, wrong)), clear=tuple(clear))


def _failures(result: Verification, wrong: list[str]) -> list[str]:
    found = []
    if not result.max_abs_error <= result.tolerance:  # also a NaN fails
        found.append(
            f"logits differ by {result.max_abs_error:.2e} from the reference; at most {result.tolerance:.0e} is right"
        )
    if 2 * result.ambiguous > result.questions:
        found.append(
            f"rounding decides {result.ambiguous} of {result.questions} requests, too many to judge by the others"
        )
    # A flip at an ambiguous cut may change an answer; more wrong answers than ambiguous requests are an error.
    if result.questions - result.matched > result.ambiguous:
        found.append(
            f"generated tokens differ for {result.questions - result.matched} of {result.questions} questions, first "
            f"{wrong[0]!r}"
        )
    return found


class _Conditioning:
    """How much of a request's outcome is left to rounding, found by running the lowered modules eagerly."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.vision = VisionEncoder(source.model, source.tokens["vision"], EXECUTORCH)
        self.prefill = Prefill(LanguageModel(source.model, source.tokens["language"], new_tokens=1, options=EXECUTORCH))
        self.exact_vision = copy.deepcopy(self.vision).double()
        self.exact_prefill = copy.deepcopy(self.prefill).double()

    @torch.no_grad()
    def __call__(self, pixel_values: torch.Tensor, question: str) -> tuple[float, float]:
        """Smallest distance between a kept and a dropped token's score over all drops (infinite without drops), and
        the largest difference between the logits in fp32 and in fp64."""
        with watch_cuts(self.vision, self.prefill) as gaps:
            embeddings, start = compact_embeddings(self.source, question, self.vision(pixel_values)[0])
            logits = self.prefill(embeddings, torch.tensor([start]))
        features = self.exact_vision(pixel_values.double())[0]
        embeddings, start = compact_embeddings(self.source, question, features)
        exact = self.exact_prefill(embeddings.double(), torch.tensor([start]))
        return min(gaps, default=float("inf")), (logits - exact).abs().max().item()


def _common(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    """Length of the common beginning."""
    length = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        length += 1
    return length
