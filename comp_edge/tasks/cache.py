"""Generated data sets are kept between runs, as safetensors with the questions in its metadata."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from contextlib import suppress

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from comp_edge.files import cache_folder
from comp_edge.tasks.vqa import Split


def cached_split(key: str, make: Callable[[], Split]) -> Split:
    """The split stored under `key`, made and stored when missing or damaged.

    A cache that cannot be written to costs time, never the run.
    """
    path = cache_folder() / f"{key}.safetensors"
    try:
        with safe_open(path, framework="numpy") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            questions = json.loads(file.metadata()["questions"])
        return Split(images=tensors.pop("images"), questions=questions, extra=tensors)
    except (OSError, SafetensorError, KeyError, TypeError, json.JSONDecodeError):
        split = make()
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors = {"images": np.ascontiguousarray(split.images), **split.extra}
        temporary.write_bytes(save(tensors, metadata={"questions": json.dumps(split.questions)}))
        os.replace(temporary, path)
    except OSError:
        with suppress(OSError):  # where nothing can be written, nothing can be removed either
            temporary.unlink()
    return split
