"""What a checkpoint must be before its weights are read: a version that is understood, unquantized, whole, safetensors."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import transformers

from comp_edge.errors import InputError
from comp_edge.files import read_json

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
SUFFIX = ".safetensors"
# What other tools keep weights in. Some are pickles: reading one would run whatever code it holds.
FOREIGN = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".h5", ".msgpack", ".gguf", ".onnx")
LFS_POINTER = b"version https://git-lfs"


def check_checkpoint(folder: Path, config: Mapping[str, Any], *, pruned: bool = False) -> None:
    """Whether comp-edge can read the checkpoint in a folder.

    Args:
        config: the JSON object of its `config.json`.
        pruned: the folder is one that comp-edge wrote (see `check_version`).

    Raises:
        InputError: written by a transformers version of another kind, quantized, without safetensors, or incomplete.
    """
    where = str(folder)
    check_version(config, where=where, pruned=pruned)
    check_unquantized(config, where=where)
    names = {path.name for path in folder.iterdir() if path.is_file()}
    index = None
    if WEIGHTS_FILE not in names and INDEX_FILE in names:
        index = read_json(folder / INDEX_FILE, what="index of the weights")
    for name in check_files(names, index, where=where):
        with (folder / name).open("rb") as file:
            if file.read(len(LFS_POINTER)) == LFS_POINTER:
                raise InputError(
                    f"weights {str(folder / name)!r} are a Git LFS pointer, not the weights themselves; fetch them with "
                    "`git lfs pull`."
                )


def check_version(config: Mapping[str, Any], *, where: str, pruned: bool = False) -> None:
    """Whether this transformers understands what another version wrote.

    transformers reads the dense checkpoints of its earlier major versions (it renames what has moved), so only a newer
    major version is refused. The layout of a pruned folder is that of the major version that it was pruned with: there
    an older one is refused, too. Minor versions never matter.

    Args:
        where: names the checkpoint in the error.

    Raises:
        InputError: the major version of `transformers_version` in the config is newer, or (pruned) another one.
    """
    written = config.get("transformers_version")
    theirs, ours = _major(written), _major(transformers.__version__)
    if theirs is None or theirs == ours or (theirs < ours and not pruned):
        return
    what = "was pruned with" if pruned else "needs"
    raise InputError(
        f"model {where!r} {what} transformers {written}, which transformers {transformers.__version__} cannot read; "
        f"install transformers {theirs}.x" + (", or prune the dense model again." if pruned else ".")
    )


def check_unquantized(config: Mapping[str, Any], *, where: str) -> None:
    """Whether a checkpoint holds plain floating-point weights.

    Raises:
        InputError: the config, or that of a part of the model, speaks of a quantization; names the method.
    """
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        for key in ("quantization_config", "compression_config"):
            found = part.get(key)
            if found:
                raise InputError(
                    f"model {where!r} is quantized ({_method(found)}); comp-edge prunes unquantized weights: give the "
                    "checkpoint that it was quantized from."
                )


def check_files(names: Collection[str], index: Any = None, *, where: str) -> list[str]:
    """Which files hold the weights.

    Args:
        names: the files beside `config.json`, in a folder or in the listing of a repository.
        index: the decoded `model.safetensors.index.json`, where the checkpoint has one.
        where: names the checkpoint in errors.

    Raises:
        InputError: a shard is missing, the index is missing or malformed, or there are no safetensors at all.
    """
    if WEIGHTS_FILE in names:
        return [WEIGHTS_FILE]
    if index is not None or INDEX_FILE in names:
        return _shards(names, index, where)
    safe = sorted(name for name in names if name.endswith(SUFFIX))
    if any("-of-" in name for name in safe):
        raise InputError(
            f"model {where!r} is incomplete: it has {safe[0]!r}, but no {INDEX_FILE}, which says what is in which file."
        )
    foreign = sorted(name for name in names if name.endswith(FOREIGN) and name != "training_args.bin")
    if safe or foreign:
        raise InputError(
            f"model {where!r} has its weights in {(safe or foreign)[0]!r}; comp-edge reads {WEIGHTS_FILE}, or several "
            f"safetensors files with {INDEX_FILE}, and nothing else."
        )
    raise InputError(f"model {where!r} has no weights: neither {WEIGHTS_FILE} nor {INDEX_FILE} is there.")


def _shards(names: Collection[str], index: Any, where: str) -> list[str]:
    table = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(table, dict) or not table or not all(isinstance(name, str) for name in table.values()):
        raise InputError(f"model {where!r}: {INDEX_FILE} must hold a 'weight_map' from tensor names to file names.")
    wanted = sorted(set(table.values()))
    for name in wanted:
        if not name.endswith(SUFFIX) or Path(name).name != name:
            raise InputError(f"model {where!r}: {INDEX_FILE} names {name!r}; a shard is a {SUFFIX} file beside it.")
    missing = [name for name in wanted if name not in names]
    if missing:
        what = f"{missing[0]!r} is" if len(missing) == 1 else f"{missing[0]!r} and {len(missing) - 1} more are"
        raise InputError(
            f"model {where!r} is incomplete: {what} missing of the {len(wanted)} files that {INDEX_FILE} names."
        )
    return wanted


def _method(quantization: Any) -> str:
    values = quantization if isinstance(quantization, dict) else {}
    if method := values.get("quant_method"):
        return str(method)
    # bitsandbytes' first checkpoints do not name it.
    bits = values.get("load_in_4bit") or values.get("load_in_8bit")
    return "bitsandbytes" if bits else "by a method that its config does not name"


def _major(version: Any) -> int | None:
    head = version.split(".")[0] if isinstance(version, str) else ""
    return int(head) if head.isdecimal() else None
