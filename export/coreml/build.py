"""Writing a bundle: convert, save, run what was saved, compare; a folder appears only when everything was right."""

from __future__ import annotations

import shutil
from pathlib import Path

from comp_edge.files import whole_folder
from export.bundle import GOLDEN_FILE, GOLDEN_KEPT, Bundle, Golden, Manifest, finish_bundle, write_golden
from export.coreml.convert import ExportError, export_programs, steps, write_packages
from export.coreml.engine import EagerEngine
from export.coreml.functions import Modules, Precision, Selection, build_modules, check_precision, method_specs
from export.coreml.swift import EXAMPLE_FILE, swift_example
from export.coreml.verify import Watched, module_failures, verify, watch_eager
from export.mil import ExecutionError, UnknownOpError
from export.mil import InputError as PackageError
from export.progress import Report, counter
from export.reference import Requests, image_spec, prompt_spec, reference, write_processor
from export.source import Source

# Of a bundle, copied as it is: it imports nothing of comp-edge.
BENCHMARK_FILE = "benchmark.py"


def build_bundle(
    precisions: tuple[Precision, ...],
    source: Source,
    requests: Requests,
    out: Path,
    *,
    selection: Selection = "topk",
    report: Report = lambda done, total, what: None,
) -> dict[Precision, Manifest]:
    """Export each precision into a bundle `out/<precision>`. Nothing is written unless all of them are right.

    Raises:
        InputError: the model has no deployment form at a precision, or `out` cannot be written.
        ExportError: an operation cannot be converted or verified, or a saved package computes something else.
    """
    modules = build_modules(source, selection=selection)
    for precision in precisions:
        check_precision(modules, precision)
    manifests = {}
    with whole_folder(out) as staging:
        report(0, 1, "exporting")
        programs = export_programs(modules, method_specs(source, modules, precisions[0]))
        folders = {precision: staging / precision for precision in precisions}
        for precision, folder in folders.items():
            folder.mkdir()
            specs = method_specs(source, modules, precision)
            step = counter(report, steps(specs), f"{precision}: converting")
            write_packages(programs, specs, precision, folder, step=step)
            write_processor(source, folder)
            example = swift_example(specs, prompt_spec(source), precision)
            (folder / EXAMPLE_FILE).write_text(example, encoding="utf-8")
            write_benchmark(folder)
        golden = reference(source, requests, progress=counter(report, len(requests), "reference answers"))
        plain = None
        for precision, folder in folders.items():
            fields = _manifest_fields(source, modules, precision)
            finish_bundle(folder, **fields)
            bundle = Bundle.open(folder)
            if plain is None:
                plain = watch_eager(
                    bundle, EagerEngine(modules), golden, progress=counter(report, len(requests), "eager answers")
                )
                if failures := module_failures(plain, golden):
                    raise ExportError(f"The modules to convert are not the model: {'; '.join(failures)}.")
            manifests[precision] = _verified(
                bundle, modules, precision, golden, plain, notes=source.notes, fields=fields, report=report
            )
    return manifests


def write_benchmark(folder: Path) -> None:
    """Put the script into a bundle that times its functions where Core ML is."""
    shutil.copyfile(Path(__file__).with_name(BENCHMARK_FILE), folder / BENCHMARK_FILE)


def _verified(
    bundle: Bundle,
    modules: Modules,
    precision: Precision,
    golden: Golden,
    plain: Watched,
    *,
    notes: tuple[str, ...],
    fields: dict,
    report: Report,
) -> Manifest:
    """Verify a bundle that lacks only its golden file, and complete it."""
    total = len(golden.questions)
    exact, expected = plain, golden
    if precision == "fp16":
        exact = watch_eager(
            bundle,
            EagerEngine(modules, round_to_fp16=True),
            golden,
            progress=counter(report, total, "eager answers with fp16 weights"),
        )
        expected = exact.golden
    try:
        outcome = verify(
            bundle,
            precision,
            selection=modules.selection,
            reference=expected,
            exact=exact,
            plain=plain,
            source_golden=golden,
            progress=counter(report, total, f"{precision}: verifying"),
        )
    except UnknownOpError as error:
        raise ExportError(f"The {precision} package cannot be verified: {error}.") from None
    except (PackageError, ExecutionError) as error:
        raise ExportError(f"The {precision} package was saved but does not run: {error}.") from None
    if outcome.failures:
        raise ExportError(f"The {precision} package is not right: {'; '.join(outcome.failures)}.")
    write_golden(bundle.path(GOLDEN_FILE), expected.take(outcome.clear[:GOLDEN_KEPT]))
    return finish_bundle(
        bundle.folder, **fields, verification=outcome.verification, warnings=(*notes, *outcome.warnings)
    )


def _manifest_fields(source: Source, modules: Modules, precision: Precision) -> dict:
    return {
        "backend": "coreml",
        "profile": "scheduled",
        "model_type": source.plan.model_type,
        "base": source.plan.base,
        "precision": "float16" if precision == "fp16" else "float32",
        "methods": tuple(method_specs(source, modules, precision).values()),
        "image": image_spec(source),
        "prompt": prompt_spec(source),
        "tokens": source.tokens,
    }
