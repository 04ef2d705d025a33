"""Writing and verifying Core ML bundles of a model that reads an image and a whole text: an image and a text package.

The same three questions as in `export.coreml.verify`: is the fp32 package the right program, is the fp16 package, and what does
fp16 cost?
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from comp_edge.files import whole_folder
from export.bundle import (
    GOLDEN_FILE,
    GOLDEN_KEPT,
    Bundle,
    Manifest,
    MethodSpec,
    TensorSpec,
    TextGolden,
    Verification,
    finish_bundle,
    write_text_golden,
)
from export.coreml.build import write_benchmark
from export.coreml.convert import ExportError, export_programs, steps, write_packages
from export.coreml.engine import Cut, EagerEngine, MilEngine, survivors
from export.coreml.functions import DTYPES, ONLY_FUNCTION, Precision, Selection
from export.coreml.verify import AMBIGUOUS_MARGIN, INTERPRETED, TOLERANCES, KeptSets
from export.encoder_compare import INPUTS, Comparison, wrong_texts
from export.encoder_methods import Part, method_spec
from export.encoder_runner import EncoderRunner, Response
from export.encoders import EncoderSource, encoder_reference
from export.graph import COREML
from export.mil import ExecutionError, UnknownOpError
from export.mil import InputError as PackageError
from export.progress import Progress, Report, counter
from export.reference import Requests, image_spec, pixel_range, write_processor

PROFILE = "encoders"
REFERENCES: dict[Precision, str] = {
    "fp32": "transformers, fp32, eager, one request at a time",
    "fp16": "eager modules with weights and tables rounded to fp16, computed in fp32, one request at a time",
}
STREAMS = {"image_encoder": "vision", "vision_encoder": "vision"}  # the others drop tokens of the text


@dataclass(frozen=True)
class EncoderModules:
    """What `EagerEngine` and `export_programs` run: a module per method."""

    by_method: dict[str, nn.Module]
    selection: Selection


@dataclass(frozen=True)
class Watched:
    """The eager modules on every request: responses as a golden reference, and per request the drops of each method."""

    golden: TextGolden
    cuts: tuple[dict[str, list[Cut]], ...]

    def ambiguous(self, index: int) -> bool:
        """Whether two programs that differ by rounding alone may keep different tokens."""
        return any(cut.margin < AMBIGUOUS_MARGIN for cuts in self.cuts[index].values() for cut in cuts)


def build_encoders(
    precisions: tuple[Precision, ...],
    source: EncoderSource,
    requests: Requests,
    out: Path,
    *,
    selection: Selection = "topk",
    report: Report = lambda done, total, what: None,
) -> dict[Precision, Manifest]:
    """Export each precision into a bundle `out/<precision>`. Nothing is written unless all of them are right.

    Raises:
        InputError: the model has no deployment form, or `out` cannot be written.
        ExportError: an operation cannot be converted or verified, or a saved package computes something else.
    """
    parts = source.parts(dataclasses.replace(COREML, selection=selection))
    modules = EncoderModules({name: part.module for name, part in parts.items()}, selection)
    manifests = {}
    with whole_folder(out) as staging:
        report(0, 1, "exporting")
        programs = export_programs(modules, method_specs(source, parts, precisions[0]))
        folders = {precision: staging / precision for precision in precisions}
        for precision, folder in folders.items():
            folder.mkdir()
            specs = method_specs(source, parts, precision)
            write_packages(
                programs, specs, precision, folder, step=counter(report, steps(specs), f"{precision}: converting")
            )
            write_processor(source, folder)
            write_benchmark(folder)
        del programs
        golden = encoder_reference(source, requests, progress=counter(report, len(requests), "reference answers"))
        plain = None
        for precision, folder in folders.items():
            fields = _manifest_fields(source, parts, precision)
            finish_bundle(folder, **fields)
            bundle = Bundle.open(folder)
            if plain is None:
                step = counter(report, len(requests), "eager answers")
                plain = watch_eager(bundle, EagerEngine(modules), golden, progress=step)
                if failures := _module_failures(plain, golden):
                    raise ExportError(f"The modules to convert are not the model: {'; '.join(failures)}.")
            manifests[precision] = _verified(
                bundle, source, modules, precision, golden, plain, fields=fields, report=report
            )
    return manifests


# ---- what the manifest says


def method_specs(source: EncoderSource, parts: Mapping[str, Part], precision: Precision) -> dict[str, MethodSpec]:
    """What the manifest says of each method: the first is the image package's, all others are the text package's."""
    first, *others = parts
    prefix, pixels = f"{source.plan.model_type}_{precision}", pixel_range(image_spec(source))
    specs = {}
    for name, part in parts.items():
        several = name != first and len(others) > 1
        specs[name] = method_spec(
            name,
            part,
            file=f"{prefix}_{'image' if name == first else 'text'}.mlpackage",
            function=name if several else ONLY_FUNCTION,
            floats=DTYPES[precision],
            integers="int32",
            pixels=pixels,
            states=_states(part) if several else (),
        )
    return specs


def _states(part: Part) -> tuple[TensorSpec, ...]:
    """The decoder's caches. Core ML keeps states in fp16 only, whatever the package's precision."""
    if not hasattr(part.module, "decoder"):
        return ()
    found = []
    for name, buffer in part.module.decoder.named_buffers():
        kind, _, layer = name.partition("_")
        if kind in ("keys", "values") and layer.isdigit():
            layout = "head, channel, entry" if kind == "keys" else "head, entry, channel"
            # The name that the buffer has within both modules, which the front end keeps.
            found.append(TensorSpec(name=f"decoder_{name}", shape=tuple(buffer.shape), dtype="float16", layout=layout))
    return tuple(found)


def _manifest_fields(source: EncoderSource, parts: Mapping[str, Part], precision: Precision) -> dict[str, Any]:
    return {
        "backend": "coreml",
        "profile": PROFILE,
        "model_type": source.plan.model_type,
        "base": source.plan.base,
        "precision": DTYPES[precision],
        "methods": tuple(method_specs(source, parts, precision).values()),
        "image": image_spec(source),
        "text": source.text,
        "answer": source.answer,
        "tokens": source.tokens,
    }


# ---- verification


def watch_eager(bundle: Bundle, engine: EagerEngine, requests: TextGolden, *, progress: Progress) -> Watched:
    """Answer every request with the eager modules, noting what each drop kept.

    Args:
        requests: of which only the inputs are used, and which outputs are looked at.
    """
    runner, responses, cuts = EncoderRunner(bundle, engine=engine), [], []
    for index in range(len(requests.texts)):
        responses.append(_respond(runner, requests, index))
        cuts.append({method.name: engine.cuts[method.name] for method in runner.once})
        progress()
    tensors = {
        name: value if name in INPUTS else torch.cat([one.tensors[name] for one in responses])
        for name, value in requests.tensors.items()
    }
    golden = TextGolden(
        texts=requests.texts,
        tensors=tensors,
        tokens=tuple(one.tokens for one in responses) if requests.tokens else (),
        logits=tuple(torch.cat(one.logits) for one in responses) if requests.tokens else (),
    )
    return Watched(golden=golden, cuts=tuple(cuts))


def _respond(runner: EncoderRunner, requests: TextGolden, index: int) -> Response:
    pixels, ids = (requests.tensors[name][index : index + 1] for name in INPUTS)
    return runner.respond(pixels, ids)


def _module_failures(plain: Watched, golden: TextGolden) -> list[str]:
    """Where the eager modules differ from transformers' answers: the fp16 package is compared with them."""
    found = Comparison(golden, TOLERANCES["fp32"])
    for index in range(len(golden.texts)):
        mine = plain.golden.take([index])
        response = Response(mine.tensors, *((mine.tokens[0], tuple(mine.logits[0].split(1))) if mine.tokens else ()))
        found.add(response, index, counts=not plain.ambiguous(index))
    return found.failures()


def _verified(
    bundle: Bundle,
    source: EncoderSource,
    modules: EncoderModules,
    precision: Precision,
    golden: TextGolden,
    plain: Watched,
    *,
    fields: dict[str, Any],
    report: Report,
) -> Manifest:
    """Verify a bundle that lacks only its golden file, and complete it."""
    total, exact, expected = len(golden.texts), plain, golden
    if precision == "fp16":
        step = counter(report, total, "eager answers with fp16 weights")
        exact = watch_eager(bundle, EagerEngine(modules, round_to_fp16=True), golden, progress=step)
        expected = exact.golden
    verifier = _Verifier(bundle, source, modules.selection, precision, expected, exact, plain, golden)
    try:
        for index, _ in enumerate(golden.texts, 1):
            verifier.check(index - 1)
            report(index, total, f"{precision}: verifying")
    except UnknownOpError as error:
        raise ExportError(f"The {precision} package cannot be verified: {error}.") from None
    except (PackageError, ExecutionError) as error:
        raise ExportError(f"The {precision} package was saved but does not run: {error}.") from None
    if failures := verifier.failures():
        raise ExportError(f"The {precision} package is not right: {'; '.join(failures)}.")
    write_text_golden(bundle.path(GOLDEN_FILE), expected.take(verifier.clear()[:GOLDEN_KEPT]))
    return finish_bundle(
        bundle.folder, **fields, verification=verifier.verification(), warnings=(*source.notes, *verifier.warnings())
    )


class _Verifier:
    """Runs the packages of a bundle on requests, computed in fp32 and as declared.

    Args:
        reference: what the fp32 evaluation must give.
        exact: the eager modules with the weights that the package stores (fp16: rounded), to tell ambiguous drops.
        plain: the eager modules as they are, for the kept sets that a rounded run should keep.
        golden: transformers' answers, which the declared evaluation is measured against.
    """

    def __init__(
        self,
        bundle: Bundle,
        source: EncoderSource,
        selection: Selection,
        precision: Precision,
        reference: TextGolden,
        exact: Watched,
        plain: Watched,
        golden: TextGolden,
    ) -> None:
        self.source, self.precision = source, precision
        self.reference, self.exact, self.plain = reference, exact, plain
        self.runner = EncoderRunner(bundle, engine=MilEngine(bundle, selection=selection))
        self.declared = MilEngine(bundle, precision="declared", selection=selection, watch=True)
        self.declared_runner = EncoderRunner(bundle, engine=self.declared)
        tolerance = TOLERANCES[precision]
        self.right, self.apart = Comparison(reference, tolerance), Comparison(reference, tolerance)
        self.envelope, self.kept = Comparison(golden, tolerance), KeptSets()
        self.same_sets: list[bool] = []

    def check(self, index: int) -> None:
        """One request."""
        response, ambiguous = _respond(self.runner, self.reference, index), self.exact.ambiguous(index)
        self.right.add(response, index, counts=not ambiguous)
        self.apart.add(response, index, counts=ambiguous)
        rounded = _respond(self.declared_runner, self.reference, index)
        agree = self._compare_kept(index)
        self.same_sets.append(agree)
        self.envelope.add(rounded, index, counts=agree)

    def _compare_kept(self, index: int) -> bool:
        """Compare every drop of a request with the exact model's; whether all agree. Padding does not matter."""
        same, counted = True, self.source.counted(self.reference.texts[index])
        for method, cuts in self.plain.cuts[index].items():
            stream = STREAMS.get(method, "language")
            tokens = self.source.tokens[stream][0]
            real = tokens if stream == "vision" else counted
            exact, rounded = (
                [{token for token in left if token < real} for left in survivors(kept, tokens=tokens)]
                for kept in ([cut.kept for cut in cuts], self.declared.kept[method])
            )
            for cut, a, b in zip(cuts, exact, rounded, strict=True):
                self.kept.compared += 1
                self.kept.agreeing += a == b
                self.kept.smallest_margin = min(self.kept.smallest_margin, cut.margin)
                if a != b and same:
                    self.kept.lost_margins.append(cut.margin)
                same = same and a == b
        return same

    @property
    def _ambiguous(self) -> int:
        return sum(map(self.exact.ambiguous, range(len(self.reference.texts))))

    def failures(self) -> list[str]:
        """What makes the package wrong; empty for a right one."""
        found, wrong = self.right.failures(), self.right.matched.count(False)
        if self.reference.tokens and wrong > self._ambiguous:
            found.append(f"generated tokens differ for {wrong} of {len(self.right.matched)} requests")
        if different := wrong_texts(self.runner, self.reference):
            found.append(f"the manifest's rules make other tokens of {different[0]!r} than the model's processor")
        if not found and not self.clear():
            found.append(
                "every request has a token drop that rounding decides, so nothing was compared; give other requests"
            )
        return found

    def warnings(self) -> list[str]:
        """What a user should know of the rounded run."""
        if math.isfinite(self.envelope.error):
            return []
        advice = "; deploy fp32" if self.precision == "fp16" else ""
        return [f"rounded to its declared types, the {self.precision} package gives values that are not finite{advice}"]

    def clear(self) -> list[int]:
        """Requests that are right and not ambiguous: golden. Best those that a device reproduces too."""
        found = [i for i, same in enumerate(self.right.matched) if same and not self.exact.ambiguous(i)]
        return sorted(found, key=lambda i: not self.same_sets[i])

    def verification(self) -> Verification:
        """The manifest's report."""
        total, matched, ambiguous = len(self.reference.texts), sum(self.right.matched), self._ambiguous
        writes = bool(self.reference.tokens)
        return Verification(
            reference=REFERENCES[self.precision],
            questions=total,
            matched=matched,
            tokens_equal=matched == total if writes else None,
            max_abs_error=self.right.error,
            tolerance=TOLERANCES[self.precision],
            ambiguous=ambiguous,
            ambiguous_max_abs_error=self.apart.error if ambiguous else None,
            details={
                "meaning": INTERPRETED,
                "errors": self.right.errors,
                "declared": {
                    "reference": REFERENCES["fp32"],
                    "max_abs_error": _finite(self.envelope.error) if any(self.same_sets) else None,
                    "errors": {name: _finite(error) for name, error in self.envelope.errors.items()},
                    "questions_with_equal_kept_sets": sum(self.same_sets),
                    "tokens_matched": sum(self.envelope.matched) if writes else None,
                },
                "kept_sets": self.kept.to_json(),
            },
        )


def _finite(value: float) -> float | None:
    """JSON has no infinity and no NaN."""
    return value if math.isfinite(value) else None
