"""Timing the methods of an ExecuTorch program on inputs made from the program's own metadata."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from devices.errors import DeviceError

# ScalarType values of executorch's schema.
DTYPES = {
    1: torch.int8,
    3: torch.int32,
    4: torch.int64,
    5: torch.float16,
    6: torch.float32,
    7: torch.float64,
    11: torch.bool,
}


@dataclass(frozen=True)
class LoadedMethod:
    """A method ready to run; the program is kept alive with it."""

    program: Any
    method: Any
    inputs: tuple[torch.Tensor, ...]

    def __call__(self) -> Any:
        return self.method.execute(self.inputs)


def set_threads(threads: int) -> None:
    """Threads of XNNPACK's pool, for programs that are loaded afterwards (it cannot change under a loaded method)."""
    # What these packages log while they are imported (optional libraries that are missing) is nothing to a user.
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    import executorch.extension.pybindings.portable_lib as portable

    if portable._threadpool_get_thread_count() != threads:
        portable._unsafe_reset_threadpool(threads)


def load_methods(path: str | Path, *, threads: int, method: str | None = None) -> dict[str, LoadedMethod]:
    """Load the methods of a .pte that take tensors, with zeros as inputs (dynamic sizes at their largest).

    Args:
        method: only this one.

    Raises:
        DeviceError: no such file, no program, or no such method.
    """
    if not Path(path).is_file():
        raise DeviceError(f"program {str(path)!r} does not exist; give a .pte file.")
    set_threads(threads)
    from executorch.runtime import Runtime

    try:
        program = Runtime.get().load_program(Path(path))
    except (OSError, RuntimeError) as error:
        raise DeviceError(f"program {str(path)!r} cannot be loaded: {str(error).splitlines()[0]}.") from None
    if method is not None and method not in program.method_names:
        raise DeviceError(
            f"program {str(path)!r} has no method {method!r}; it has {', '.join(sorted(program.method_names))}."
        )
    loaded = {}
    for name in sorted(program.method_names) if method is None else [method]:
        meta = program.metadata(name)
        if meta.num_inputs() == 0:
            continue  # constant methods
        inputs = tuple(_zeros(meta.input_tensor_meta(i)) for i in range(meta.num_inputs()))
        loaded[name] = LoadedMethod(program=program, method=program.load_method(name), inputs=inputs)
    if not loaded:
        raise DeviceError(f"program {str(path)!r} has no method that takes inputs.")
    return loaded


def _zeros(meta: Any) -> torch.Tensor:
    return torch.zeros(meta.sizes(), dtype=DTYPES[meta.dtype()])
