"""From modules to saved packages: export once, convert for each precision, merge the language functions into one package."""

from __future__ import annotations

import errno
import io
import logging
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import torch

from export.bundle import MethodSpec
from export.coreml.functions import (
    DEFAULT_LANGUAGE_FUNCTION,
    ONLY_FUNCTION,
    Modules,
    Precision,
    example_inputs,
)
from export.coreml_compat import UnsupportedOperatorError, corrected_frontend
from export.progress import Progress


class ExportError(RuntimeError):
    """No right package could be made of a model that was given properly."""


def export_programs(modules: Modules, specs: Mapping[str, MethodSpec]) -> dict[str, torch.export.ExportedProgram]:
    """The traced program of each method; one serves every precision."""
    with _quiet(), torch.no_grad():
        return {
            name: torch.export.export(modules.by_method[name], example_inputs(spec), strict=False).run_decompositions(
                {}
            )
            for name, spec in specs.items()
        }


def write_packages(
    programs: Mapping[str, torch.export.ExportedProgram],
    specs: Mapping[str, MethodSpec],
    precision: Precision,
    folder: Path,
    *,
    step: Progress = lambda: None,
) -> None:
    """Convert every method and save the packages that the specs name into `folder`.

    Args:
        step: called after each conversion, and after each package of several functions was merged.

    Raises:
        ExportError: an operation cannot be converted.
        OSError: a package cannot be saved.
    """
    for file in dict.fromkeys(spec.file for spec in specs.values()):
        parts = {name: spec for name, spec in specs.items() if spec.file == file}
        single = [spec.function for spec in parts.values()] == [ONLY_FUNCTION]
        pieces = {}
        for name, spec in parts.items():
            pieces[spec.function] = folder / (file if single else f"part_{name}.mlpackage")
            _save(_convert(programs[name], spec, precision), pieces[spec.function])
            step()
        if not single:
            _merge(pieces, folder / file)
            for piece in pieces.values():
                shutil.rmtree(piece)
            step()


def steps(specs: Mapping[str, MethodSpec]) -> int:
    """How often `write_packages` calls its `step`."""
    return len(specs) + 1


def _convert(program: torch.export.ExportedProgram, spec: MethodSpec, precision: Precision) -> Any:
    with _quiet():
        import coremltools as ct
        import numpy as np

        types = {"float16": np.float16, "float32": np.float32, "int32": np.int32}
        try:
            with corrected_frontend():
                model = ct.convert(
                    program,
                    inputs=[
                        ct.TensorType(name=port.name, shape=port.shape, dtype=types[port.dtype]) for port in spec.inputs
                    ],
                    outputs=[ct.TensorType(name=port.name, dtype=types[port.dtype]) for port in spec.outputs],
                    minimum_deployment_target=ct.target.iOS18,
                    compute_precision=ct.precision.FLOAT16 if precision == "fp16" else ct.precision.FLOAT32,
                    # There is nothing to load it with on Linux, and compiling it is the device's work.
                    skip_model_load=True,
                )
        except (NotImplementedError, UnsupportedOperatorError, RuntimeError, ValueError) as error:
            raise ExportError(f"{spec.name} cannot be converted to Core ML: {_first_line(error)}.") from error
        for port in spec.inputs:
            model.input_description[port.name] = ". ".join(text for text in (port.layout, port.about) if text)
        for port in spec.outputs:
            model.output_description[port.name] = ". ".join(text for text in (port.layout, port.about) if text)
    return model


def _save(model: Any, path: Path) -> None:
    with _quiet(), _as_os_error(path):
        model.save(str(path))
    # Of use to the converter's developers only.
    (path / "executorch_debug_handle_mapping.json").unlink(missing_ok=True)


def _merge(pieces: Mapping[str, Path], path: Path) -> None:
    """One package of several functions; equal weights are stored once."""
    with _quiet(), _as_os_error(path):
        import coremltools as ct

        descriptor = ct.utils.MultiFunctionDescriptor()
        for function, piece in pieces.items():
            descriptor.add_function(str(piece), src_function_name=ONLY_FUNCTION, target_function_name=function)
        descriptor.default_function_name = DEFAULT_LANGUAGE_FUNCTION
        ct.utils.save_multifunction(descriptor, str(path))


@contextmanager
def _as_os_error(path: Path) -> Iterator[None]:
    """One sentence for a package that cannot be written.

    The C++ code reports a full disk as a RuntimeError, and copying a folder as a list of all files that failed.
    """
    try:
        yield
    except shutil.Error as error:
        (_, _, reason), *_ = error.args[0]
        raise OSError(errno.EIO, f"saving {path.name} failed: {reason.split(': ')[0]}") from error
    except RuntimeError as error:
        raise OSError(errno.EIO, f"saving {path.name} failed: {_first_line(error)}") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep coremltools' progress bars, prints and advice off the terminal; errors still raise."""
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(previous)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
