"""What a .pte holds, and the threads of the runtime in this process."""

from __future__ import annotations

import logging
from pathlib import Path

from devices.errors import DeviceError
from devices.transports.local import reading

MAGIC = b"ET"  # behind the first four bytes, before the schema's number


def set_threads(threads: int) -> None:
    """Threads of XNNPACK's pool, for programs that are loaded afterwards (it cannot change under a loaded method)."""
    _quiet()
    import executorch.extension.pybindings.portable_lib as portable

    if portable._threadpool_get_thread_count() != threads:
        portable._unsafe_reset_threadpool(threads)


def method_names(path: str | Path) -> list[str]:
    """The methods of a program that take inputs; of an ONNX program, which has one, the file's name.

    Raises:
        DeviceError: no such file, no program, or none that takes inputs.
    """
    path = Path(path)
    if not path.is_file():
        raise DeviceError(f"program {str(path)!r} does not exist; give a .pte file.")
    if path.suffix == ".onnx":
        return [path.stem]
    with reading(path) as file:
        begin = file.read(8)
    if begin[4:6] != MAGIC:  # the runtime does not say so, it aborts
        raise DeviceError(f"program {str(path)!r} is no ExecuTorch program; give a .pte file.")
    _quiet()
    from executorch.runtime import Runtime

    try:
        program = Runtime.get().load_program(path)
    except (OSError, RuntimeError) as error:
        raise DeviceError(f"program {str(path)!r} cannot be loaded: {str(error).splitlines()[0]}.") from None
    found = [name for name in sorted(program.method_names) if program.metadata(name).num_inputs()]
    if not found:
        raise DeviceError(f"program {str(path)!r} has no method that takes inputs.")
    return found


def _quiet() -> None:
    # What these packages log while they are imported (optional libraries that are missing) is nothing to a user.
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
