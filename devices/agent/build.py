"""Building the C++ agent for a processor: an executable, and the libraries of ExecuTorch's wheel that it needs.

For this machine with `g++` and the wheel that is installed; for another processor with Debian's cross compiler and that
processor's wheel of the same version, which pip downloads. What was built is kept.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

from devices.errors import DeviceError

MACHINES = ("x86_64", "aarch64")  # as `uname -m` says it
SOURCE = Path(__file__).with_name("agent.cpp")
HEADERS = tuple(SOURCE.with_name(name) for name in ("agent_options.h", "agent_tensors.h"))
EXECUTABLE = "agent"
# Beside the agent: the loader and the C and C++ libraries that it was linked with, for devices whose own are older or of
# another kind (Android).
SYSTEM = "system"
# All of the wheel's that register something when they are loaded; no symbol of most of them is named in the source.
LIBRARIES = (
    "executorch",
    "executorch_kernels_optimized",
    "executorch_kernels_quantized",
    "executorch_backend_xnnpack",
    "executorch_threadpool",
    "executorch_etdump",
)
FLAGS = (
    "-std=c++17",
    "-O2",
    "-Wall",
    "-Wextra",
    # What the wheel's CMake package asks of its users.
    "-DC10_USING_CUSTOM_GENERATED_MACROS",
    "-DET_EVENT_TRACER_ENABLED",
)
LINK_FLAGS = ("-Wl,--no-as-needed", "-Wl,--enable-new-dtags", "-Wl,-rpath,$ORIGIN")
PLATFORM = "manylinux_2_28"  # of the wheels
TIMEOUT = 600  # seconds for a download or a compilation

_NEEDED = re.compile(r"\(NEEDED\).*\[(.+)\]")
_INTERPRETER = re.compile(r"program interpreter: (/[^\]]+)\]")
_VERSION = re.compile(r"\b(GLIBC|GLIBCXX|CXXABI|GCC)_([0-9]+(?:\.[0-9]+)*)\b")


def build(machine: str = platform.machine(), *, cache: Path | None = None) -> Path:
    """A folder with `agent`, the shared libraries of the wheel that it needs, and `system/` (see `SYSTEM`).

    Args:
        machine: the processor, as `uname -m` says it.
        cache: where what is built is kept; by default comp-edge's own folder (`COMP_EDGE_CACHE`).

    Raises:
        DeviceError: another processor, no compiler, no wheel, or it cannot be compiled.
    """
    if machine not in MACHINES:
        raise DeviceError(f"no agent can be built for {machine!r}; accepted: {', '.join(MACHINES)}.")
    if cache is None:
        from comp_edge.files import cache_folder

        cache = cache_folder() / "agents"
    version = _executorch_version()
    compiler = _compiler(machine)
    key = hashlib.sha256()
    for path in (SOURCE, *HEADERS):
        key.update(hashlib.sha256(path.read_bytes()).digest())
    key.update("\0".join((version, machine, _compiler_version(compiler), *FLAGS, *LINK_FLAGS, *LIBRARIES)).encode())
    target = cache / f"agent-{machine}-{key.hexdigest()[:16]}"
    return _once(target, lambda folder: _compile(folder, compiler, _wheel(machine, version, cache), version))


def requirements(folder: Path) -> dict[str, str]:
    """The newest symbol versions that a built folder needs of a device's own libraries, such as {"GLIBC": "2.34"}.

    With the libraries in `system/` it needs none of them.
    """
    newest: dict[str, str] = {}
    for path in sorted(folder.iterdir()):
        if path.is_file():
            for name, version in _VERSION.findall(_readelf("--version-info", path)):
                newest[name] = max(newest.get(name, "0"), version, key=_as_numbers)
    return newest


def _as_numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))


@functools.cache
def _executorch_version() -> str:
    return importlib.metadata.version("executorch")


def _is_native(machine: str) -> bool:
    return platform.system() == "Linux" and platform.machine() == machine


def _compiler(machine: str) -> str:
    name = "g++" if _is_native(machine) else f"{machine}-linux-gnu-g++"
    found = shutil.which(name)
    if found is None:
        package = "g++" if name == "g++" else f"g++-{machine.replace('_', '-')}-linux-gnu"
        raise DeviceError(f"the agent for {machine} needs the compiler {name!r}; Debian's package {package} has it.")
    return found


@functools.cache
def _compiler_version(compiler: str) -> str:
    return _output([compiler, "--version"])


def _wheel(machine: str, version: str, cache: Path) -> Path:
    """The folder of the package `executorch` for a processor."""
    if _is_native(machine):
        spec = importlib.util.find_spec("executorch")
        return Path(next(iter(spec.submodule_search_locations)))
    target = cache / f"executorch-{version}-{machine}"
    return _once(target, lambda folder: _download(folder, machine, version)) / "executorch"


def _download(folder: Path, machine: str, version: str) -> None:
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary=:all:", "--platform", f"{PLATFORM}_{machine}", "--python-version", python]
    command += ["--implementation", "cp", "--dest", str(folder), f"executorch=={version}"]
    try:
        _output(command)
    except DeviceError as error:
        raise DeviceError(
            f"the wheel of executorch {version} for {machine} cannot be downloaded, and the agent for that processor is "
            f"built from it: {error}"
        ) from None
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if name.startswith(("executorch/include/", "executorch/lib/")):
                archive.extract(name, folder)
    wheel.unlink()


def _compile(folder: Path, compiler: str, package: Path, version: str) -> None:
    include, libraries = package / "include", package / "lib"
    agent = folder / EXECUTABLE
    command = [compiler, *FLAGS, f'-DAGENT_RUNTIME="executorch {version}"', str(SOURCE), "-o", str(agent)]
    # As system headers: their warnings are not ours.
    for path in (include, include / "executorch/runtime/core/portable_type/c10"):
        command += ["-isystem", str(path)]
    command += [*LINK_FLAGS, f"-L{libraries}", *(f"-l{name}" for name in LIBRARIES)]
    _output(command)
    own, foreign = _needed(agent, lambda name: libraries / name)
    for path in own:
        shutil.copyfile(path, folder / path.name)
    (folder / SYSTEM).mkdir()
    names = [*foreign, Path(_INTERPRETER.search(_readelf("--program-headers", agent))[1]).name]
    for name in dict.fromkeys(names):
        path = Path(_output([compiler, f"-print-file-name={name}"]).strip())
        if not path.is_absolute():
            raise DeviceError(f"{compiler!r} does not know where its own library {name!r} is.")
        shutil.copyfile(path, folder / SYSTEM / name)
    for name in (EXECUTABLE, f"{SYSTEM}/{names[-1]}"):
        (folder / name).chmod(0o755)


def _needed(start: Path, place: Callable[[str], Path]) -> tuple[list[Path], list[str]]:
    """The libraries that a file needs, directly or through others: those that are in place, and the names of the rest."""
    own: dict[str, Path] = {}
    foreign: dict[str, None] = {}
    left = [start]
    while left:
        for name in _NEEDED.findall(_readelf("--dynamic", left.pop())):
            path = place(name)
            if not path.is_file():
                foreign[name] = None
            elif name not in own:
                own[name] = path
                left.append(path)
    return list(own.values()), list(foreign)


def _readelf(what: str, path: Path) -> str:
    return _output(["readelf", "--wide", what, str(path)])


def _output(command: Sequence[str]) -> str:
    """What a program of this machine prints.

    Raises:
        DeviceError: there is no such program, or it fails; with its first line that speaks of an error.
    """
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=TIMEOUT,
            env=os.environ | {"LC_ALL": "C"},
        )
    except OSError as error:
        raise DeviceError(f"{command[0]!r} cannot be run ({error.strerror}).") from None
    except subprocess.TimeoutExpired:
        raise DeviceError(f"{command[0]!r} took longer than {TIMEOUT} s.") from None
    if done.returncode != 0:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        reason = next((line for line in lines if "error" in line.lower()), lines[-1] if lines else "it says nothing")
        raise DeviceError(f"{Path(command[0]).name!r} failed with {done.returncode}: {reason[:300].rstrip('.')}.")
    return done.stdout


def _once(target: Path, make: Callable[[Path], None]) -> Path:
    """A folder that is made unless it is there; it appears whole or not at all, also when two processes make it at once."""
    if target.is_dir():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as scratch:
            folder = Path(scratch, "whole")
            folder.mkdir()
            make(folder)
            try:
                os.rename(folder, target)
            except OSError:
                if not target.is_dir():  # somebody else was faster
                    raise
    except OSError as error:
        raise DeviceError(f"{str(target)!r} cannot be written ({error.strerror or error}).") from None
    return target
