"""Is the written program right? Loaded back and run on whole requests, against transformers' own `generate`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from export.bundle import Bundle, Golden, Verification, largest
from export.executorch.runner import StockRunner, open_runner
from export.graph import EXECUTORCH, LanguageModel, Prefill, VisionEncoder
from export.graph.select import watch_cuts
from export.progress import Progress
from export.reference import prefill_inputs
from export.source import Source

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


def verify(folder: Path, golden: Golden, source: Source, *, progress: Progress = lambda: None) -> Outcome:
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
    judgements = judge(source, golden)
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
        gap, rounding = judgements[index]
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
        # Answers with parts of characters, or with tokens that the tokenizer does not know.
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


@torch.no_grad()
def judge(source: Source, golden: Golden) -> list[tuple[float, float]]:
    """How much of each request's outcome is left to rounding, found by running the lowered modules eagerly.

    Returns:
        per request the smallest distance between a kept and a dropped token's score over all drops (infinite without
        drops), and the largest difference between the first token's logits in fp32 and in fp64.
    """
    vision = VisionEncoder(source.model, source.tokens["vision"], EXECUTORCH, size=source.image_size)
    language = LanguageModel(
        source.model, source.tokens["language"], new_tokens=1, options=EXECUTORCH, grid=source.grid
    )
    prefill = Prefill(language)
    gaps, logits = [], []

    def run(dtype: torch.dtype) -> Iterator[torch.Tensor]:
        for index, question in enumerate(golden.questions):
            output = vision(golden.pixel_values[index : index + 1].to(dtype))
            features, kept = (output[0][0], output[1][0]) if vision.says_kept else (output[0], None)
            embeddings, *others = prefill_inputs(source, question, features, kept)
            yield prefill(embeddings.to(dtype), *others)

    with watch_cuts(vision, prefill) as cuts:
        for found in run(torch.float32):
            logits.append(found)
            gaps.append(min(cuts, default=float("inf")))
            cuts.clear()
    # In turns, so that a large model is not held in both: its values are the same in either.
    vision.double(), prefill.double()
    differences = [(a - b).abs().max().item() for a, b in zip(logits, run(torch.float64), strict=True)]
    return list(zip(gaps, differences, strict=True))


def _common(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    """Length of the common beginning."""
    length = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        length += 1
    return length
