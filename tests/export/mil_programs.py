"""Builds tiny Core ML programs op by op, saves them as packages and runs the saved package."""

import inspect
import logging
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

import coremltools as ct
import torch
from coremltools.converters.mil import Builder as mb
from coremltools.converters.mil.mil import Function, Program, types
from torch import Tensor

from export.mil import Interpreter

_TYPES = {
    torch.float16: types.fp16,
    torch.float32: types.fp32,
    torch.int32: types.int32,
    torch.bool: types.fp32,
}
Case = tuple[Callable, Callable]
"""How to build outputs from the inputs that the parameters name, and what torch makes of the same inputs."""


def build_package(
    folder: Path,
    inputs: Mapping[str, Tensor],
    build: Callable[..., list],
    *,
    target: ct.target = ct.target.iOS18,
    states: Mapping[str, tuple[int, ...]] | None = None,
    fp16: bool = False,
) -> Path:
    """Saves a program with these inputs (and fp16 states); `build` gets them all by name and returns outputs.

    Only what Core ML requires is done to the program (no optimisation), unless `fp16` asks for half
    precision. Core ML has no boolean inputs: those are fp32 outside and boolean for `build`.
    """
    program = Program()
    placeholders = {
        name: mb.placeholder(shape=tuple(value.shape), dtype=_TYPES[value.dtype]) for name, value in inputs.items()
    }
    for name, shape in (states or {}).items():
        placeholders[name] = mb.state_tensor_placeholder(shape=shape, dtype=types.fp16)
    with Function(placeholders, opset_version=target) as function:
        values = {
            name: mb.cast(x=value, dtype="bool") if name in inputs and inputs[name].dtype == torch.bool else value
            for name, value in function.inputs.items()
        }
        function.set_outputs(list(build(**values)))
    program.add_function("main", function)
    return save(program, folder, target=target, fp16=fp16)


def save(source: object, folder: Path, *, target: ct.target = ct.target.iOS18, fp16: bool = False, **options) -> Path:
    """Converts a MIL program or an exported torch program and saves it."""
    if isinstance(source, Program) and not fp16:
        options["pass_pipeline"] = ct.PassPipeline.EMPTY
    logging.getLogger("coremltools").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = ct.convert(
            source,
            convert_to="mlprogram",
            minimum_deployment_target=target,
            compute_precision=ct.precision.FLOAT16 if fp16 else ct.precision.FLOAT32,
            skip_model_load=True,
            **options,
        )
        path = folder / "model.mlpackage"
        model.save(str(path))
    return path


def save_module(module: torch.nn.Module, arguments: tuple, folder: Path, **options) -> Path:
    """Converts a torch module the way that the exporter does."""
    with torch.no_grad():
        exported = torch.export.export(module.eval(), arguments, strict=False).run_decompositions({})
    return save(exported, folder, **options)


def run_cases(
    cases: Mapping[str, Case], inputs: Mapping[str, Tensor], folder: Path, **options
) -> dict[str, tuple[list[Tensor], list[Tensor]]]:
    """Builds all cases into one program and runs it. Returns what each case gave and should have given."""
    counts: list[int] = []

    def build(**placeholders: object) -> list:
        outputs = []
        for name, (builder, _) in cases.items():
            made = builder(*_named(builder, placeholders))
            made = list(made) if isinstance(made, list | tuple) else [made]
            counts.append(len(made))
            # An identity gives each output a name of its own, even when two cases are equal.
            outputs += [mb.identity(x=value, name=f"out_{name}_{n}") for n, value in enumerate(made)]
        return outputs

    path = build_package(folder, inputs, build, **options)
    given = list(Interpreter(path).run(as_inputs(inputs)).values())
    results = {}
    for (name, (builder, reference)), count in zip(cases.items(), counts, strict=True):
        wanted = reference(*_named(builder, inputs))
        wanted = list(wanted) if isinstance(wanted, list | tuple) else [wanted]
        results[name] = (given[:count], wanted)
        given = given[count:]
    return results


def as_inputs(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Values as Core ML takes them: booleans as fp32."""
    return {name: value.float() if value.dtype == torch.bool else value for name, value in values.items()}


def assert_equal(result: tuple[list[Tensor], list[Tensor]], *, tolerance: float = 1e-6) -> None:
    """Compares what a case gave with what it should give: integers exactly, floats within `tolerance`."""
    given, wanted = result
    assert len(given) == len(wanted)
    for one, other in zip(given, wanted, strict=True):
        other = torch.as_tensor(other)
        assert list(one.shape) == list(other.shape)
        if one.is_floating_point():
            torch.testing.assert_close(one, other.to(one.dtype), atol=tolerance, rtol=tolerance, equal_nan=True)
        else:
            assert torch.equal(one.long(), other.long())


def _named(builder: Callable, values: Mapping[str, object]) -> list:
    return [values[name] for name in inspect.signature(builder).parameters]
