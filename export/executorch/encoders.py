"""Writing and verifying an ExecuTorch bundle of a model that reads an image and a whole text."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from comp_edge.files import whole_folder
from export.bundle import (
    GOLDEN_FILE,
    GOLDEN_KEPT,
    Bundle,
    BundleError,
    Manifest,
    TextGolden,
    Verification,
    finish_bundle,
    write_text_golden,
)
from export.encoder_compare import Comparison, unclear, wrong_texts
from export.encoder_methods import Part, method_spec
from export.encoder_runner import EncoderRunner
from export.encoders import EncoderSource, encoder_reference
from export.executorch.build import VerificationError
from export.executorch.lower import Method, delegation_warnings, lower
from export.executorch.profiles import PROGRAM_FILE
from export.executorch.verify import TOLERANCE
from export.graph import EXECUTORCH
from export.progress import Progress, Report, counter
from export.reference import Requests, image_spec, pixel_range, write_processor

PROFILE = "encoders"
REFERENCE = "transformers, fp32, eager, one request at a time"


def build_encoders(source: EncoderSource, requests: Requests, out: Path, *, report: Report) -> dict[str, Manifest]:
    """Export into `out/encoders`. Nothing is written unless it is right.

    Raises:
        InputError: the model has no deployment form, or `out` cannot be written.
        VerificationError: the program loads or computes wrongly.
    """
    with whole_folder(out) as staging:
        (staging / PROFILE).mkdir()
        return {PROFILE: _build(source, requests, staging / PROFILE, report=report)}


def _build(source: EncoderSource, requests: Requests, folder: Path, *, report: Report) -> Manifest:
    report(0, 1, "lowering to XNNPACK")
    image = image_spec(source)
    parts = source.parts(EXECUTORCH)
    methods = {name: _method(name, part, pixel_range(image)) for name, part in parts.items()}
    lowered = lower(methods, constants={})
    (folder / PROGRAM_FILE).write_bytes(lowered.program)
    write_processor(source, folder)
    golden = encoder_reference(source, requests, progress=counter(report, len(requests), "reference answers"))
    fields = {
        "backend": "executorch",
        "profile": PROFILE,
        "model_type": source.plan.model_type,
        "base": source.plan.base,
        "precision": "float32",
        "methods": tuple(method.spec for method in methods.values()),
        "image": image,
        "text": source.text,
        "answer": source.answer,
        "tokens": source.tokens,
        "delegation": lowered.delegation,
        "warnings": (*source.notes, *delegation_warnings(lowered.delegation)),
    }
    # Large models: what is in memory of the program is not needed any more.
    del methods, lowered
    finish_bundle(folder, **fields)
    try:
        outcome = verify_encoders(folder, golden, parts, progress=counter(report, len(requests), "verifying"))
    except BundleError as error:
        raise VerificationError(f"the program was written but does not run: {error}") from None
    if outcome.failures:
        raise VerificationError(f"the program is not right: {'; '.join(outcome.failures)}.")
    write_text_golden(folder / GOLDEN_FILE, golden.take(outcome.clear[:GOLDEN_KEPT]))
    return finish_bundle(folder, **fields, verification=outcome.verification)


def _method(name: str, part: Part, pixels: tuple[float, float]) -> Method:
    spec = method_spec(name, part, file=PROGRAM_FILE, floats="float32", integers="int64", pixels=pixels)
    return Method(module=part.module, inputs=part.example(), spec=spec)


@dataclass(frozen=True)
class Outcome:
    """What a run over all requests found; `failures` is empty for a program that is right.

    `clear` are the requests that are not ambiguous and right: fit to be golden.
    """

    verification: Verification
    failures: tuple[str, ...]
    clear: tuple[int, ...]


def verify_encoders(
    folder: Path, golden: TextGolden, parts: dict[str, Part], *, progress: Progress = lambda: None
) -> Outcome:
    """Run the program of a bundle folder on the golden requests.

    Args:
        parts: the modules that were lowered, to tell which requests rounding decides; they are in fp64 afterwards.
        progress: called after each request.
    """
    bundle = Bundle.open(folder)
    runner = EncoderRunner(bundle)
    ambiguous = unclear(bundle, {name: part.module for name, part in parts.items()}, golden)
    right, apart = Comparison(golden, TOLERANCE), Comparison(golden, TOLERANCE)
    for index in range(len(golden.texts)):
        pixels, ids = (golden.tensors[name][index : index + 1] for name in ("pixel_values", "input_ids"))
        response = runner.respond(pixels, ids)
        right.add(response, index, counts=not ambiguous[index])
        apart.add(response, index, counts=ambiguous[index])
        progress()
    total, matched, left = len(golden.texts), sum(right.matched), sum(ambiguous)
    verification = Verification(
        reference=REFERENCE,
        questions=total,
        matched=matched,
        tokens_equal=matched == total if golden.tokens else None,
        max_abs_error=right.error,
        tolerance=TOLERANCE,
        ambiguous=left,
        ambiguous_max_abs_error=apart.error if left else None,
        details={"errors": right.errors},
    )
    failures = right.failures()
    if 2 * left > total:
        failures.append(f"rounding decides {left} of {total} requests, too many to judge by the others")
    if golden.tokens and total - matched > left:
        failures.append(f"generated tokens differ for {total - matched} of {total} requests")
    if different := wrong_texts(runner, golden):
        failures.append(f"the manifest's rules make other tokens of {different[0]!r} than the model's processor")
    clear = tuple(i for i in range(total) if right.matched[i] and not ambiguous[i])
    return Outcome(verification=verification, failures=tuple(failures), clear=clear)
