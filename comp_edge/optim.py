"""Optimizers, learning-rate shape and their state on disk (safetensors, nothing pickled)."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from comp_edge.errors import InputError
from comp_edge.muon import Muon
from comp_edge.parallel import ALONE, Processes

MUON_LIMIT = 50_000_000  # parameters
SMALL_LR, LARGE_LR = 2e-3, 5e-4  # AdamW's, in models up to that limit and above


class Optimizer:
    """Muon for hidden matrices, AdamW for the rest (embeddings, output head, vectors), behind one learning-rate factor.

    Muon orthogonalises every matrix at every step. In a model of a million parameters that is nothing; at 256 million it
    takes several times as long as forward and backward on a CPU, so larger models have AdamW for everything.

    Args:
        parameters: `named_parameters()` of what is trained; frozen ones are left out.
        matrix_lr: Muon's peak learning rate, in AdamW's scale (`match_rms_adamw`).
        muon: use Muon; None decides by the number of parameters (see `MUON_LIMIT`).
        lr: AdamW's peak learning rate; by default 2e-3 beside Muon, and 5e-4 where it trains everything.
    """

    def __init__(
        self,
        parameters: Iterable[tuple[str, nn.Parameter]],
        *,
        matrix_lr: float,
        lr: float | None = None,
        weight_decay: float = 0.02,
        muon: bool | None = None,
    ) -> None:
        named = [(name, p) for name, p in parameters if p.requires_grad and p.numel()]
        muon = use_muon(p for _, p in named) if muon is None else muon
        lr = (SMALL_LR if muon else LARGE_LR) if lr is None else lr
        matrices = [p for name, p in named if muon and p.ndim == 2 and not _is_table(name)]
        chosen = {id(p) for p in matrices}
        others = [p for _, p in named if id(p) not in chosen]
        self.parameters = matrices + others
        self._optimizers: list[tuple[torch.optim.Optimizer, float]] = []
        if matrices:
            orthogonal = Muon(matrices, lr=matrix_lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
            self._optimizers.append((orthogonal, matrix_lr))
        if others:
            adam = torch.optim.AdamW(others, lr=lr, weight_decay=weight_decay, betas=(0.9, 0.98))
            self._optimizers.append((adam, lr))

    def step(self, loss: Tensor, *, factor: float) -> float:
        """Backward, clip the gradient norm to 1, step with `factor` times the peak learning rates.

        Returns:
            The gradient norm before clipping.

        Raises:
            FloatingPointError: loss or gradient are not finite; the parameters are as they were.
        """
        return self.step_in_parts([loss], factor=factor)

    def step_in_parts(self, losses: Iterable[Tensor], *, factor: float, processes: Processes = ALONE) -> float:
        """`step` on the sum of several losses, those of the other processes included.

        Args:
            losses: drawn one by one, each after the backward pass of the one before, so that a generator of them never
                holds more than one graph.
        """
        for optimizer, peak in self._optimizers:
            optimizer.zero_grad(set_to_none=True)
            for group in optimizer.param_groups:
                group["lr"] = peak * factor
        total = 0.0
        for loss in losses:
            loss.backward()
            total += float(loss.detach())
        processes.sum_gradients(self.parameters)
        total = processes.sum(total)
        norm = float(nn.utils.clip_grad_norm_(self.parameters, 1.0))
        if not (math.isfinite(norm) and math.isfinite(total)):
            raise FloatingPointError(f"loss {total} with gradient norm {norm} is not finite")
        for optimizer, _ in self._optimizers:
            optimizer.step()
        return norm

    def state_tensors(self) -> dict[str, Tensor]:
        """The state as a flat dictionary of tensors."""
        flat: dict[str, Tensor] = {}
        for i, (optimizer, _) in enumerate(self._optimizers):
            for index, state in optimizer.state_dict()["state"].items():
                for key, value in state.items():
                    flat[f"{i}.{index}.{key}"] = torch.as_tensor(value).contiguous()
        return flat

    def load_state_tensors(self, flat: dict[str, Tensor]) -> None:
        """Restore what `state_tensors` gave."""
        for i, (optimizer, _) in enumerate(self._optimizers):
            state: dict[int, dict[str, Tensor]] = {}
            for name, value in flat.items():
                which, index, key = name.split(".", 2)
                if int(which) == i:
                    state.setdefault(int(index), {})[key] = value
            optimizer.load_state_dict({**optimizer.state_dict(), "state": state})


def use_muon(parameters: Iterable[Tensor]) -> bool:
    """Whether a model is small enough for Muon."""
    return sum(parameter.numel() for parameter in parameters) <= MUON_LIMIT


def _is_table(name: str) -> bool:
    """Embeddings and output heads are tables of vectors: orthogonalising their updates makes no sense."""
    return "embed" in name or "head" in name or "auxiliary" in name


def warmup_cosine(step: int, total: int, *, warmup: int = 50, floor: float = 0.02) -> float:
    """Learning-rate factor of a step: linear warm-up, then cosine down to `floor`."""
    rise = min(1.0, (step + 1) / max(warmup, 1))
    return rise * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, step / max(total, 1)))))


def _standing_alone(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors of which no two share memory, as safetensors wants them; only those that do are copied."""
    alone, seen = {}, set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().contiguous()
        place = tensor.untyped_storage().data_ptr()
        if tensor.numel() and place in seen:
            tensor = tensor.clone()
        seen.add(place)
        alone[name] = tensor
    return alone


def save_state(path: str | Path, tensors: dict[str, Tensor], progress: dict[str, Any]) -> None:
    """Tensors and a JSON record of the progress, in one safetensors file that appears whole or not at all."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        alone = _standing_alone(tensors)
        save_file(alone, temporary, metadata={"progress": json.dumps(progress)})
        temporary.replace(path)
    except (OSError, SafetensorError) as error:
        with suppress(OSError):  # where nothing can be written, nothing can be removed either
            temporary.unlink()
        raise InputError(f"cannot write {str(path)!r}: {error}.") from None


def load_state(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `save_state` wrote.

    Raises:
        InputError: the file is missing, truncated or of another kind.
    """
    try:
        with safe_open(path, framework="pt") as file:
            progress = json.loads((file.metadata() or {})["progress"])
            return {name: file.get_tensor(name) for name in file.keys()}, progress  # noqa: SIM118
    except FileNotFoundError:
        raise InputError(f"there is nothing to resume: {str(path)!r} does not exist.") from None
    except (OSError, SafetensorError, KeyError, json.JSONDecodeError) as error:
        raise InputError(f"checkpoint {str(path)!r} is damaged ({error}); delete it to start afresh.") from None


def with_prefix(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin with a prefix, without it: one part of what `save_state` put together."""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
