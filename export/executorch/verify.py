"""Is the written program right? Loaded back and run on whole requests, against transformers' own `generate`."""

from __future__ import annotations

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

    Logits are compared for each generated token as long as the tokens agree, and the image features once. Where a token
    drop has two candidates that score alike within rounding, the program may rightly keep the other one; such
    requests' errors are reported apart.

    Args:
        progress: called after each request.
    """
    bundle = Bundle.open(folder)
    runner = open_runner(bundle)
    stock = StockRunner(bundle) if bundle.manifest.profile == "stock" else None
    gap_of = _CutGaps(source)
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
        unclear = gap_of(pixels, question) < AMBIGUOUS_GAP
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
    # A flip at an ambiguous cut may change an answer; more wrong answers than ambiguous requests are an error.
    if result.questions - result.matched > result.ambiguous:
        found.append(
            f"generated tokens differ for {result.questions - result.matched} of {result.questions} questions, first "
            f"{wrong[0]!r}"
        )
    return found


class _CutGaps:
    """Smallest distance between a kept and a dropped token's score, over all drops of a request."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.vision = VisionEncoder(source.model, source.tokens["vision"], EXECUTORCH)
        self.prefill = Prefill(LanguageModel(source.model, source.tokens["language"], new_tokens=1, options=EXECUTORCH))
        drops = [len(set(tokens)) > 1 for tokens in source.tokens.values()]
        self.any_drop = any(drops)

    @torch.no_grad()
    def __call__(self, pixel_values: torch.Tensor, question: str) -> float:
        if not self.any_drop:
            return float("inf")
        with watch_cuts(self.vision, self.prefill) as gaps:
            features = self.vision(pixel_values)[0]
            embeddings, start = compact_embeddings(self.source, question, features)
            self.prefill(embeddings, torch.tensor([start]))
        return min(gaps)


def _common(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    """Length of the common beginning."""
    length = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        length += 1
    return length
