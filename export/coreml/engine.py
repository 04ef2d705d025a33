"""What runs the methods of a bundle here: the interpreter of saved packages, and the eager modules as the reference.

Both remember what the last call of a method gave and which tokens it kept, and both drive
`export.executorch.runner.ScheduledRunner`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from export.bundle import Bundle
from export.coreml.functions import Modules, Selection
from export.graph.select import Select
from export.mil import Interpreter, Package, Trace

# The operation that shows what a drop keeps.
WATCHED = {"topk": "topk", "rank": "less"}


@dataclass(frozen=True)
class Cut:
    """One drop: which of the tokens that came in were kept (ascending), and how clear that was.

    Attributes:
        margin: the worst kept score less the best dropped one; infinite where both are padding.
    """

    kept: tuple[int, ...]
    margin: float


class EagerEngine:
    """The modules themselves. `outputs` and `cuts` hold the first output and the drops of each method's last call."""

    def __init__(self, modules: Modules, *, round_to_fp16: bool = False) -> None:
        """Args:
        round_to_fp16: round weights and tables to fp16 (and compute in fp32), as an fp16 package stores them.
        """
        self._modules, self._rounds = modules.by_method, round_to_fp16
        if round_to_fp16:
            # In one call, so that prefill and decode still share their language model.
            self._modules = copy.deepcopy(self._modules)
            _round_to_fp16(self._modules.values())
        self.cuts: dict[str, list[Cut]] = {}
        self.outputs: dict[str, Tensor] = {}

    def call(self, method: str, *inputs: Tensor) -> Tensor:
        """Run a method; its first output."""
        return self.call_all(method, *inputs)[0]

    def call_all(self, method: str, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Run a method; all its outputs."""
        module = self._modules[method]
        with torch.no_grad(), _watch(module) as cuts, _RoundedConstants() if self._rounds else nullcontext():
            output = module(*inputs)
        outputs = output if isinstance(output, tuple) else (output,)
        self.cuts[method], self.outputs[method] = cuts, outputs[0]
        return outputs


class MilEngine:
    """The saved packages of a bundle, in the interpreter; functions of a package share one state.

    `outputs` holds the first output of each method's last call, `kept` what its drops kept.
    """

    def __init__(
        self, bundle: Bundle, *, precision: str = "float32", selection: Selection = "topk", watch: bool = False
    ) -> None:
        """Args:
            precision: "float32" or "declared", see `export.mil.Interpreter`.
            watch: fill `kept`.

        Raises:
            export.mil.InputError, export.mil.UnknownOpError: a package cannot be run.
        """
        self._methods = {method.name: method for method in bundle.manifest.methods}
        packages = {name: Package(bundle.path(name)) for name in {method.file for method in self._methods.values()}}
        self._interpreters = {
            name: Interpreter(packages[method.file], method.function, precision)
            for name, method in self._methods.items()
        }
        self._states = {
            method.file: self._interpreters[name].make_state()
            for name, method in self._methods.items()
            if method.states
        }
        self._selection, self._watch = selection, watch
        self.kept: dict[str, list[tuple[int, ...]]] = {}
        self.outputs: dict[str, Tensor] = {}

    def call(self, method: str, *inputs: Tensor) -> Tensor:
        """Run a method; its first output, in fp32."""
        return self.call_all(method, *inputs)[0]

    def call_all(self, method: str, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Run a method; all its outputs, floats in fp32."""
        spec = self._methods[method]
        trace = Trace(ops={WATCHED[self._selection]}) if self._watch else None
        named = {port.name: value for port, value in zip(spec.inputs, inputs, strict=True)}
        state = self._states[spec.file] if spec.states else None
        outputs = self._interpreters[method].run(named, state, trace=trace)
        if trace is not None:
            self.kept[method] = kept_tokens(trace, self._selection)
        found = tuple(outputs[port.name] for port in spec.outputs)
        found = tuple(value.to(torch.float32) if value.is_floating_point() else value for value in found)
        self.outputs[method] = found[0]
        return found


def kept_tokens(trace: Trace, selection: Selection) -> list[tuple[int, ...]]:
    """What each drop of a traced run kept, as ascending indices of the tokens that came in.

    "topk" has two top-k a drop, of which only the first ranks floats; "rank" has one comparison `rank < keep`.
    """
    kept = []
    for record in trace.records:
        if selection == "rank":
            (mask,) = record.outputs.values()
            kept.append(tuple(mask.flatten().nonzero().flatten().tolist()))
        elif record.inputs["x"].is_floating_point():
            (indices,) = (value for value in record.outputs.values() if not value.is_floating_point())
            kept.append(tuple(sorted(indices.flatten().tolist())))
    return kept


def survivors(kept: Sequence[Sequence[int]], *, tokens: int, start: int = 0) -> list[frozenset[int]]:
    """After each drop, which of the original tokens are left, padding (the first `start`) not counted.

    Args:
        kept: per drop, indices into what the drop before left.
    """
    left = list(range(tokens))
    after = []
    for indices in kept:
        left = [left[i] for i in indices]
        after.append(frozenset(token for token in left if token >= start))
    return after


def _round_to_fp16(modules: Iterable[nn.Module]) -> None:
    with torch.no_grad():
        for module in modules:
            for tensor in (*module.parameters(), *module.buffers()):
                if tensor.is_floating_point():
                    tensor.copy_(tensor.half().float())


class _RoundedConstants(TorchFunctionMode):
    """Round constants that a forward pass writes down as tensors, which a package stores like weights."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        return result.half().float() if func is Tensor.new_tensor and result.is_floating_point() else result


@contextmanager
def _watch(module: nn.Module) -> Iterator[list[Cut]]:
    cuts: list[Cut] = []

    def record(select: Select, args: tuple[Tensor, ...]) -> None:
        scores = (args[0] + select.protection)[0]
        best, dropped = scores.topk(select.keep), scores.sort(descending=True).values[select.keep].item()
        worst = best.values[-1].item()
        # Padding scores below 0 and every other token at least 0.
        margin = float("inf") if worst < 0 else worst - dropped
        cuts.append(Cut(kept=tuple(sorted(best.indices.tolist())), margin=margin))

    handles = [part.register_forward_pre_hook(record) for part in module.modules() if isinstance(part, Select)]
    try:
        yield cuts
    finally:
        for handle in handles:
            handle.remove()
