"""Is a saved package right? Run here, on whole requests, against the eager model. No device takes part.

Three questions, kept apart:

* Is the fp32 package the right program? Evaluated in fp32 against transformers' own `generate`.
* Is the fp16 package the right program? Evaluated in fp32 against the eager modules with weights and tables rounded to
  fp16, which are the numbers that the package stores: what differs then is the program.
* What does fp16 cost? Every operation rounded to its declared type, against transformers' `generate`. Where rounding makes a
  token drop keep other tokens, outputs are not comparable: how often is reported apart, with how clear the choice was.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from export.bundle import Bundle, Golden, Verification
from export.coreml.engine import Cut, EagerEngine, MilEngine, survivors
from export.coreml.functions import Precision, Selection
from export.executorch.runner import Generation, ScheduledRunner
from export.progress import Progress

# Rounding of fp32 arithmetic, respectively of it on fp16 weights.
TOLERANCES: dict[Precision, float] = {"fp32": 1e-4, "fp16": 1e-3}
# Scores are sums of probabilities of order 1; two fp32 programs' scores differ by some 1e-6.
AMBIGUOUS_MARGIN = 1e-5
REFERENCES: dict[Precision, str] = {
    "fp32": "transformers generate, fp32, eager, one request at a time",
    "fp16": "eager modules with weights and tables rounded to fp16, computed in fp32, greedy, one request at a time",
}
INTERPRETED = (
    "The saved package was executed by an interpreter on the host, with fp32 arithmetic: the errors say that it is the same "
    "program, not how a device rounds. 'declared' rounds every operation to the type that the package declares (states are "
    "always fp16); a device may accumulate differently."
)
MEANING = f"{INTERPRETED} CoreMLExample.swift was not compiled."
METHODS_THAT_DROP = {"vision_encoder": "vision", "prefill": "language"}


@dataclass(frozen=True)
class Watched:
    """The eager model on every request: its answers, and per request its drops."""

    golden: Golden
    cuts: tuple[dict[str, list[Cut]], ...]

    def ambiguous(self, index: int) -> bool:
        """Whether two programs that differ by rounding alone may keep different tokens."""
        return any(cut.margin < AMBIGUOUS_MARGIN for cuts in self.cuts[index].values() for cut in cuts)


@dataclass
class Comparison:
    """Answers against a golden reference, over the requests that count."""

    logits: float = 0.0
    features: float = 0.0
    matched: list[bool] = field(default_factory=list)

    def add(self, answer: Generation, features: torch.Tensor, golden: Golden, index: int, *, counts: bool) -> float:
        """Compare one answer; logits as long as the tokens agree, and those after the last common one.

        Returns:
            its largest error, whether it counts or not.
        """
        expected = golden.tokens[index]
        same = next(
            (i for i, (a, b) in enumerate(zip(answer.tokens, expected, strict=False)) if a != b),
            min(len(answer.tokens), len(expected)),
        )
        count = min(same + 1, len(answer.logits), len(expected))
        logits = _largest(torch.cat(answer.logits[:count]) - golden.logits[index][:count])
        image = _largest(features - golden.image_features[index])
        self.matched.append(answer.tokens == expected)
        if counts:
            self.logits, self.features = _worse(self.logits, logits), _worse(self.features, image)
        return _worse(logits, image)

    @property
    def error(self) -> float:
        """Largest error of logits and image features."""
        return _worse(self.logits, self.features)


def watch_eager(bundle: Bundle, engine: EagerEngine, requests: Golden, *, progress: Progress) -> Watched:
    """Answer every request with the eager modules, noting what each drop kept.

    Args:
        requests: of which only images and questions are used.
    """
    runner, answers, features, cuts = ScheduledRunner(bundle, engine=engine), [], [], []
    for index, question in enumerate(requests.questions):
        pixels = requests.pixel_values[index : index + 1]
        answers.append(runner.generate(pixels, question))
        cuts.append({method: engine.cuts[method] for method in METHODS_THAT_DROP})
        features.append(engine.outputs["vision_encoder"][0])
        progress()
    golden = Golden(
        questions=requests.questions,
        pixel_values=requests.pixel_values,
        image_features=torch.stack(features),
        tokens=tuple(answer.tokens for answer in answers),
        logits=tuple(torch.cat(answer.logits) for answer in answers),
    )
    return Watched(golden=golden, cuts=tuple(cuts))


def module_failures(plain: Watched, golden: Golden) -> list[str]:
    """Where the eager modules, computed in fp32, differ from transformers' answers; empty where they agree.

    The fp16 package is compared with these modules, so they must be right themselves.
    """
    found = Comparison()
    for index in range(len(golden.questions)):
        mine = plain.golden
        answer = Generation(tokens=mine.tokens[index], text="", logits=tuple(mine.logits[index].split(1)))
        found.add(answer, mine.image_features[index], golden, index, counts=not plain.ambiguous(index))
    return _too_large(found, TOLERANCES["fp32"])


@dataclass(frozen=True)
class Outcome:
    """What a run over all requests found; `failures` is empty for a package that is right.

    Attributes:
        clear: requests with equal tokens whose drops are not ambiguous (and where fp16 keeps the same tokens): golden.
    """

    verification: Verification
    failures: tuple[str, ...]
    warnings: tuple[str, ...]
    clear: tuple[int, ...]


def verify(
    bundle: Bundle,
    precision: Precision,
    *,
    selection: Selection,
    reference: Golden,
    exact: Watched,
    plain: Watched,
    source_golden: Golden,
    progress: Progress,
) -> Outcome:
    """Run the packages of a bundle on every request, computed in fp32 and as declared.

    Args:
        reference: what the fp32 evaluation must give.
        exact: the eager modules with the weights that the package stores (fp16: rounded), to tell ambiguous drops.
        plain: the eager modules as they are, for the kept sets that a rounded run should keep.
        source_golden: transformers' answers, which the declared evaluation is measured against.
        progress: called after each request.

    Raises:
        export.mil.UnknownOpError: an operation that the interpreter does not know.
    """
    program = MilEngine(bundle, selection=selection)
    declared = MilEngine(bundle, precision="declared", selection=selection, watch=True)
    runners = [ScheduledRunner(bundle, engine=engine) for engine in (program, declared)]
    right, envelope, kept = Comparison(), Comparison(), KeptSets()
    ambiguous_error, ambiguous = 0.0, 0
    same_sets = []
    for index, question in enumerate(reference.questions):
        pixels = reference.pixel_values[index : index + 1]
        answers = [runner.generate(pixels, question) for runner in runners]
        unclear = exact.ambiguous(index)
        error = right.add(answers[0], program.outputs["vision_encoder"][0], reference, index, counts=not unclear)
        if unclear:
            ambiguous, ambiguous_error = ambiguous + 1, _worse(ambiguous_error, error)
        padding = bundle.manifest.prompt.max_text_tokens - (len(runners[0].prompt_ids(question)) - 1)
        starts = {"vision_encoder": 0, "prefill": padding}
        agree = kept.add(declared.kept, plain.cuts[index], tokens=bundle.manifest.tokens, starts=starts)
        same_sets.append(agree)
        envelope.add(answers[1], declared.outputs["vision_encoder"][0], source_golden, index, counts=agree)
        progress()
    total = len(reference.questions)
    matched = sum(right.matched)
    verification = Verification(
        reference=REFERENCES[precision],
        questions=total,
        matched=matched,
        tokens_equal=matched == total,
        max_abs_error=right.logits,
        tolerance=TOLERANCES[precision],
        ambiguous=ambiguous,
        ambiguous_max_abs_error=ambiguous_error if ambiguous else None,
        details={
            "meaning": MEANING,
            "image_features_max_abs_error": right.features,
            "declared": {
                "reference": REFERENCES["fp32"],
                "max_abs_error": _finite(envelope.logits) if any(same_sets) else None,
                "image_features_max_abs_error": _finite(envelope.features) if any(same_sets) else None,
                "questions_with_equal_kept_sets": sum(same_sets),
                "tokens_matched": sum(envelope.matched),
            },
            "kept_sets": kept.to_json(),
        },
    )
    wrong = [reference.questions[i] for i, same in enumerate(right.matched) if not same]
    clear = [i for i in range(total) if right.matched[i] and not exact.ambiguous(i)]
    # Best those that a device reproduces too.
    clear.sort(key=lambda i: not (same_sets[i] and envelope.matched[i]))
    return Outcome(
        verification=verification,
        failures=tuple(_failures(verification, right, wrong, clear)),
        warnings=tuple(_warnings(envelope, precision)),
        clear=tuple(clear),
    )


def _failures(result: Verification, right: Comparison, wrong: Sequence[str], clear: Sequence[int]) -> list[str]:
    found = _too_large(right, result.tolerance)
    # A flip at an ambiguous cut may change an answer; more wrong answers than ambiguous requests are an error.
    if len(wrong) > result.ambiguous:
        found.append(f"generated tokens differ for {len(wrong)} of {result.questions} questions, first {wrong[0]!r}")
    if not clear and not found:
        found.append(
            "every request has a token drop that rounding decides, so nothing was compared; give other requests"
        )
    return found


def _too_large(comparison: Comparison, tolerance: float) -> list[str]:
    return [
        f"{what} differ by {error:.2e} from the reference; at most {tolerance:.0e} is right"
        for what, error in (("logits", comparison.logits), ("image features", comparison.features))
        if not error <= tolerance  # also a NaN is too large
    ]


def _warnings(envelope: Comparison, precision: Precision) -> list[str]:
    if math.isfinite(envelope.error):
        return []
    advice = "; deploy fp32" if precision == "fp16" else ""
    return [f"rounded to its declared types, the {precision} package gives values that are not finite{advice}"]


@dataclass
class KeptSets:
    """How often the drops of a rounded run keep the tokens that the exact model keeps."""

    agreeing: int = 0
    compared: int = 0
    smallest_margin: float = float("inf")
    # Of the first drop of a request that differs; those after it start from other tokens.
    lost_margins: list[float] = field(default_factory=list)

    def add(
        self,
        kept: dict[str, list[tuple[int, ...]]],
        cuts: dict[str, list[Cut]],
        *,
        tokens: dict[str, tuple[int, ...]],
        starts: dict[str, int],
    ) -> bool:
        """Compare every drop of a request; whether all agree.

        Args:
            starts: padding that each method's tokens begin with.
        """
        same = True
        for method, stream in METHODS_THAT_DROP.items():
            sizes = {"tokens": tokens[stream][0], "start": starts[method]}
            exact = survivors([cut.kept for cut in cuts[method]], **sizes)
            rounded = survivors(kept[method], **sizes)
            for cut, a, b in zip(cuts[method], exact, rounded, strict=True):
                self.compared += 1
                self.agreeing += a == b
                self.smallest_margin = min(self.smallest_margin, cut.margin)
                if a != b and same:
                    self.lost_margins.append(cut.margin)
                same = same and a == b
        return same

    @property
    def agreement(self) -> float:
        """Fraction of drops that agree; 1 where nothing is dropped."""
        return self.agreeing / self.compared if self.compared else 1.0

    def to_json(self) -> dict[str, Any]:
        """The numbers; margins are those of the exact scores, sums of probabilities."""
        return {
            "agreement": self.agreement,
            "agreeing": self.agreeing,
            "compared": self.compared,
            "smallest_cut_margin": _finite(self.smallest_margin),
            "largest_cut_margin_lost": max(self.lost_margins, default=None),
        }


def _largest(difference: torch.Tensor) -> float:
    return difference.abs().max().item()


def _finite(value: float) -> float | None:
    """JSON has no infinity and no NaN."""
    return value if math.isfinite(value) else None


def _worse(a: float, b: float) -> float:
    """The larger; a NaN is larger than everything (`max` may lose it)."""
    return math.nan if math.isnan(a) or math.isnan(b) else max(a, b)
