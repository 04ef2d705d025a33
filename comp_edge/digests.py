"""Which weights these are: of a model's folder, and of a model in memory."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch

from comp_edge.checkpoint import resolve

DIGEST = 16  # hexadecimal digits
SAMPLES = 4096  # values of a tensor that are looked at, about


def weights_digest(ref: str | Path) -> str | None:
    """A digest of the weights that a reference names; None where they lie in no folder here.

    Raises:
        InputError: see `resolve`.
    """
    source = resolve(ref)
    files = sorted(source.glob("*.safetensors")) if isinstance(source, Path) else []
    digest = hashlib.sha256(b"".join(hashlib.sha256(file.read_bytes()).digest() for file in files))
    return digest.hexdigest()[:DIGEST] if files else None


def fingerprint(model: Any) -> str:
    """Tells a model in memory from others: names, shapes and dtypes of its tensors, and some of their values."""
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        flat = value.detach().reshape(-1)
        seen = flat[:: max(1, flat.numel() // SAMPLES)].cpu().contiguous()
        digest.update(f"{name} {tuple(value.shape)} {value.dtype} ".encode() + seen.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:DIGEST]
