"""Is a bundle whole and right? Each check says what it found."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import jsonschema
import torch

from export.bundle import (
    SCHEMA_FILE,
    Bundle,
    BundleError,
    DynamicSize,
    Golden,
    TensorSpec,
    TextGolden,
    largest,
    parse_manifest,
    read_manifest,
)
from export.encoder_runner import EncoderRunner, Response, runner_of
from export.executorch.runner import Engine, ExecuTorchEngine, Runner, StockRunner

Status = Literal["pass", "fail", "skip"]
DEFAULT_TOLERANCE = 1e-4
# ScalarType of executorch's schema.
DTYPES = {"float32": 6, "float16": 5, "int64": 4, "int32": 3}


@dataclass(frozen=True)
class Check:
    """One finding; `measured` holds its number, if it has one."""

    name: str
    status: Status
    detail: str
    measured: float | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def run_checks(folder: Path) -> tuple[list[Check], Runner | EncoderRunner | None]:
    """All checks of one bundle, and the runner for timing it (None when the program does not load).

    Raises:
        BundleError: the folder has no readable manifest.
    """
    checks = [check_schema(read_manifest(folder))]
    if checks[0].status == "fail":
        return checks, None
    bundle = Bundle.open(folder)
    checks.append(check_hashes(bundle))
    try:
        golden = bundle.golden() if bundle.manifest.text is None else bundle.text_golden()
        runner = runner_of(bundle, engine=open_engine(bundle))
    except BundleError as error:
        return [*checks, Check("load", "fail", str(error))], None
    checks.append(_guarded("signatures", lambda: check_signatures(bundle, runner)))
    if isinstance(runner, EncoderRunner):
        checks.append(_guarded("texts", lambda: check_texts(runner, golden)))
        checks += _guarded_list("golden", lambda: check_responses(runner, golden))
        return checks, runner
    checks += _guarded_list("golden", lambda: check_golden(bundle, runner, golden))
    if bundle.manifest.profile == "stock":
        checks.append(_guarded("MultimodalRunner", lambda: check_multimodal_runner(bundle, runner, golden)))
    return checks, runner


def open_engine(bundle: Bundle) -> Engine:
    """What executes the program: ExecuTorch's runtime, or the interpreter of saved Core ML packages."""
    if bundle.manifest.backend == "coreml":
        # Imports coremltools, which an ExecuTorch bundle does not need.
        from runtime_tests.coreml import MilEngine

        return MilEngine(bundle)
    return ExecuTorchEngine(bundle.path(bundle.manifest.methods[0].file))


def _guarded(name: str, check: Callable[[], Check]) -> Check:
    return _guarded_list(name, lambda: [check()])[0]


def _guarded_list(name: str, check: Callable[[], list[Check]]) -> list[Check]:
    """A program that raises while it is checked has failed the check."""
    try:
        return check()
    except Exception as error:  # noqa: BLE001 - whatever the runtime raises is the finding
        text = (str(error).strip().splitlines() or [""])[0]
        return [Check(name, "fail", f"{type(error).__name__}: {text}")]


def check_schema(manifest: dict[str, Any]) -> Check:
    """The manifest against the shipped JSON Schema, then against what only code can check."""
    schema = json.loads(SCHEMA_FILE.read_text(encoding="utf-8"))
    errors = sorted(jsonschema.Draft202012Validator(schema).iter_errors(manifest), key=lambda e: list(map(str, e.path)))
    if errors:
        place = ".".join(str(part) for part in errors[0].absolute_path) or "manifest"
        return Check("manifest", "fail", f"{place}: {errors[0].message}")
    try:
        parse_manifest(manifest)
    except BundleError as error:
        return Check("manifest", "fail", str(error))
    return Check("manifest", "pass", f"schema {manifest['schema']}, {len(manifest['methods'])} methods")


def check_hashes(bundle: Bundle) -> Check:
    """Every file is there, unchanged, and nothing else."""
    errors = bundle.hash_errors()
    if errors:
        return Check("hashes", "fail", "; ".join(errors))
    return Check("hashes", "pass", f"{len(bundle.manifest.files)} files")


def check_signatures(bundle: Bundle, runner: Runner | EncoderRunner) -> Check:
    """What the program says of its methods is what the manifest says."""
    if bundle.manifest.backend == "coreml":
        wrong = runner.engine.signature_errors()
    else:
        wrong = _executorch_signature_errors(bundle, runner.engine)
    if wrong:
        return Check("signatures", "fail", "; ".join(wrong))
    return Check("signatures", "pass", ", ".join(method.name for method in bundle.manifest.methods))


def _executorch_signature_errors(bundle: Bundle, engine: ExecuTorchEngine) -> list[str]:
    manifest, program = bundle.manifest, engine.program
    wrong = []
    expected = {method.name for method in manifest.methods} | set(manifest.constants)
    for name in sorted(expected ^ set(program.method_names)):
        side = "the manifest" if name in expected else "the program"
        wrong.append(f"method {name!r} is only in {side}")
    for method in manifest.methods:
        if method.name not in program.method_names:
            continue
        meta = program.metadata(method.name)
        for kind, specs, count, of in (
            ("input", method.inputs, meta.num_inputs(), meta.input_tensor_meta),
            ("output", method.outputs, meta.num_outputs(), meta.output_tensor_meta),
        ):
            if len(specs) != count:
                wrong.append(f"{method.name} has {count} {kind}s, the manifest says {len(specs)}")
                continue
            for index, spec in enumerate(specs):
                actual = of(index)
                if list(actual.sizes()) != _largest(spec) or actual.dtype() != DTYPES[spec.dtype]:
                    wrong.append(
                        f"{method.name} {kind} {spec.name!r} is {list(actual.sizes())} of type {actual.dtype()}, the manifest "
                        f"says {_largest(spec)} of {spec.dtype}"
                    )
    for name, value in manifest.constants.items():
        if name in program.method_names:
            actual = list(program.load_method(name).execute([]))
            if (actual if isinstance(value, list) else actual[0]) != value:
                wrong.append(f"constant {name!r} is {actual}, the manifest says {value}")
    return wrong


def _largest(spec: TensorSpec) -> list[int]:
    return [size.max if isinstance(size, DynamicSize) else size for size in spec.shape]


def check_golden(bundle: Bundle, runner: Runner, golden: Golden) -> list[Check]:
    """Whole requests against the golden file: image features, logits of every token, generated tokens."""
    tolerance = _tolerance(bundle)
    features: list[float] = []
    logits: list[float] = []
    different = []
    for index, question in enumerate(golden.questions):
        pixels = golden.pixel_values[index : index + 1]
        features.append(_error(runner.engine.call("vision_encoder", pixels)[0], golden.image_features[index]))
        answer = runner.generate(pixels, question)
        expected = golden.tokens[index]
        if answer.tokens != expected:
            different.append(f"{question!r}: {list(answer.tokens)} instead of {list(expected)}")
        common = _common(answer.tokens, expected)
        count = min(common + 1, len(expected), len(answer.logits))
        logits.append(_error(torch.cat(answer.logits[:count]), golden.logits[index][:count]))
    total = len(golden.questions)
    return [
        _within("image features", largest(features), tolerance, total),
        _within("logits", largest(logits), tolerance, total),
        _equal_tokens(different, total),
    ]


def _equal_tokens(different: Sequence[str], total: int) -> Check:
    if different:
        return Check("tokens", "fail", "; ".join(different))
    return Check("tokens", "pass", f"equal for {total} questions")


def _tolerance(bundle: Bundle) -> float:
    verification = bundle.manifest.verification
    return verification.tolerance if verification else DEFAULT_TOLERANCE


def check_texts(runner: EncoderRunner, golden: TextGolden) -> Check:
    """The bundle's tokenizer and the manifest's rules make the golden token ids of the golden texts."""
    if not runner.tokenizes:
        return Check("texts", "skip", "the bundle has no tokenizer.json")
    ids = golden.tensors["input_ids"]
    different = [
        text for index, text in enumerate(golden.texts) if not torch.equal(runner.input_ids(text)[0], ids[index])
    ]
    if different:
        return Check("texts", "fail", f"other token ids of {', '.join(map(repr, different))}")
    return Check("texts", "pass", f"token ids equal for {len(golden.texts)} texts")


def check_responses(runner: EncoderRunner, golden: TextGolden) -> list[Check]:
    """Whole requests against the golden file: every output, and the logits and tokens of answers."""
    tolerance, total = _tolerance(runner.bundle), len(golden.texts)
    inputs = {port.name for method in runner.once for port in method.inputs}
    outputs = {port.name for method in runner.once for port in method.outputs}
    names = [name for name in golden.tensors if name in outputs]
    if strange := sorted(set(golden.tensors) - outputs - inputs):
        return [Check("golden", "fail", f"no method has an output {', '.join(strange)}")]
    # What one method hands to another need not be compared, nor logits, which come with tokens.
    taken = {port.name for method in runner.bundle.manifest.methods for port in method.inputs} | {"logits"}
    if missing := sorted(outputs - taken - set(names)):
        return [Check("golden", "fail", f"the golden file lacks {', '.join(missing)}")]
    responses = [
        runner.respond(golden.tensors["pixel_values"][i : i + 1], golden.tensors["input_ids"][i : i + 1])
        for i in range(total)
    ]
    checks = []
    for name in names:
        errors = [_error(one.tensors[name][0], golden.tensors[name][i]) for i, one in enumerate(responses)]
        checks.append(_within(name, largest(errors), tolerance, total))
    if runner.answer is not None:
        checks += _answer_checks(golden, responses, tolerance)
    return checks


def _answer_checks(golden: TextGolden, responses: Sequence[Response], tolerance: float) -> list[Check]:
    total, logits, different = len(golden.texts), [], []
    if not golden.tokens:
        return [Check("tokens", "fail", "the golden file holds no answers")]
    for index, (text, response) in enumerate(zip(golden.texts, responses, strict=True)):
        expected = golden.tokens[index]
        if response.tokens != expected:
            different.append(f"{text!r}: {list(response.tokens)} instead of {list(expected)}")
        count = min(_common(response.tokens, expected) + 1, len(expected), len(response.logits))
        logits.append(_error(torch.cat(response.logits[:count]), golden.logits[index][:count]))
    return [_within("logits", largest(logits), tolerance, total), _equal_tokens(different, total)]


def check_multimodal_runner(bundle: Bundle, runner: Runner, golden: Golden) -> Check:
    """ExecuTorch's own runner gives the golden tokens (compared as text, which is what it delivers)."""
    stock = StockRunner(bundle)
    compared, different = 0, []
    for index, question in enumerate(golden.questions):
        same = stock.matches(golden.pixel_values[index], question, golden.tokens[index], runner.tokenizer)
        compared += same is not None
        if same is False:
            different.append(repr(question))
    if different:
        return Check("MultimodalRunner", "fail", f"other answers to {', '.join(different)}")
    if not compared:
        return Check("MultimodalRunner", "skip", "no golden answer is whole UTF-8 token by token")
    return Check("MultimodalRunner", "pass", f"equal for {compared} questions")


def _within(name: str, error: float, tolerance: float, total: int) -> Check:
    status: Status = "pass" if error <= tolerance else "fail"  # a NaN fails
    text = f"largest error {error:.1e}, at most {tolerance:.0e}, {total} questions"
    return Check(name, status, text, measured=None if math.isnan(error) else error)


def _error(got: torch.Tensor, expected: torch.Tensor) -> float:
    if got.shape != expected.shape:
        return float("nan")
    return (got.float() - expected).abs().max().item()


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
