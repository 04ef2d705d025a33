"""A device that is not the CPU, for machines without one: it computes on the CPU, and refuses what lies on the CPU.

Importing this registers the device type `elsewhere` with torch, for the whole process: tests run what they need of it in a
process of its own. As on a GPU, an operation that mixes its tensors with the CPU's is an error, and so is `numpy()`.

To torch it is a backend of the PrivateUse1 key that is written in Python, and every operation comes to `_compute`. A tensor
has no memory of its own, only its numbers beside it (`Held.held`), so what torch would do from parts in C++ has to come
there, too. It is thought contiguous, with views beginning at 0: what autograd works out of a view's place in memory (the
gradient of a tensor that is written into by slices) is wrong.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils._pytree import tree_map
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

aten = torch.ops.aten
TYPE = "elsewhere"
# What takes tensors of both: copies, and indices, which a GPU moves to where they are needed.
BOTH = (aten._copy_from.default, aten.index.Tensor, aten._index_put_impl_.default)
RESHAPES = (aten.view.default, aten._unsafe_view.default)
# Operations that torch makes of parts for every device: of the first kind those that give views, and these.
COMPOSED, IN_PLACES = "CompositeExplicitAutograd", "CompositeExplicitAutogradNonFunctional"
MAKERS = ("_unsafe_view", "arange", "arange.start", "arange.start_step", "eye", "eye.m")
RECENT = 1024
UNSAVED: dict[int, torch.Tensor] = {}  # by storage, the numbers of the latest tensors that autograd took copies of


class Backend(_DummyBackendModule):
    """What torch asks of a device's module; random numbers are drawn on the CPU."""

    def get_rng_state(self, device: Any = None) -> torch.Tensor:
        """The CPU's."""
        return torch.random.get_rng_state()

    def set_rng_state(self, state: torch.Tensor, device: Any = None) -> None:
        """Nothing: there is no generator but the CPU's."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        """For transformers, which asks."""
        return [torch.bfloat16]


class Held(torch.Tensor):
    """A tensor of the device; `held` has its numbers, on the CPU."""

    held: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> Held:
        held = getattr(held, "held", held)  # `copy.deepcopy` makes a parameter of another one
        tensor = torch._C._acc.create_empty_tensor(held.shape, held.dtype)
        tensor.__class__ = cls
        tensor.held = held
        return tensor

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.held!r})"

    def __format__(self, spec: str) -> str:
        return format(self.held, spec)


def _compute(operation: Any, *args: Any, **kwargs: Any) -> Any:
    """The operation on what the tensors hold; a tensor that it changes stays the tensor that it was."""
    owners: dict[int, torch.Tensor] = {}

    def opened(value: Any) -> Any:
        if isinstance(value, torch.device):
            return torch.device("cpu") if value.type == TYPE else value
        if not isinstance(value, torch.Tensor):
            return value
        if value.device.type == TYPE:
            held = value.held if isinstance(value, Held) else UNSAVED[value.untyped_storage()._cdata]
            owners[id(held)] = value
            return held
        if value.dim() and operation not in BOTH:
            raise RuntimeError(f"{operation} of the device {TYPE} was given a tensor {tuple(value.shape)} of the CPU")
        return value

    def closed(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        return owners[id(value)] if id(value) in owners else Held(value)

    args, kwargs = tree_map(opened, args), tree_map(opened, kwargs)
    if operation is aten._copy_from.default:
        source, target = args[:2]
        target.copy_(source)
        return owners.get(id(target), target)
    if operation in RESHAPES:
        operation = torch.reshape  # what is held need not be contiguous
    elif _takes_tensors_for(args, operation):
        operation = operation.overloadpacket
    return tree_map(closed, operation(*args, **kwargs))


def _index(numbers: torch.Tensor, indices: list[torch.Tensor | None]) -> torch.Tensor:
    _check_indexed(numbers)
    return _compute(aten.index.Tensor, numbers, indices)


def _index_put(numbers: torch.Tensor, indices: list[torch.Tensor | None], values: torch.Tensor, *options: Any) -> Any:
    _check_indexed(numbers)
    if values.dim() and values.device != numbers.device:
        raise RuntimeError(
            f"values {tuple(values.shape)} of {values.device} were put into a tensor of {numbers.device}"
        )
    return _compute(aten._index_put_impl_.default, numbers, indices, values, *options)


def _check_indexed(numbers: torch.Tensor) -> None:
    """Indices of the CPU may look something up here, as on a GPU; indices of here nothing that is of the CPU."""
    if numbers.device.type != TYPE:
        raise RuntimeError(f"a tensor {tuple(numbers.shape)} of the CPU was indexed by one of the device {TYPE}")


def _takes_tensors_for(args: tuple, operation: Any) -> bool:
    """Whether numbers among the arguments had been made tensors of in C++, and are numbers again."""
    expected = zip(operation._schema.arguments, args, strict=False)
    return any(isinstance(a.type, torch.TensorType) and isinstance(value, int | float) for a, value in expected)


def _convolution_backward(gradient: torch.Tensor, inputs: torch.Tensor, weight: torch.Tensor, *options: Any) -> Any:
    return _compute(aten.convolution_backward.default, gradient, inputs, weight, [len(weight)], *options)


def _composed() -> Iterator[tuple[str, Any]]:
    """Operations whose results torch would make by itself, by name."""
    for key in (COMPOSED, IN_PLACES):
        for full in torch._C._dispatch_get_registrations_for_dispatch_key(key):
            library, _, name = full.partition("::")
            packet, _, overload = name.partition(".")
            operation = getattr(getattr(aten, packet, None), overload or "default", None)
            if library != "aten" or operation is None:
                continue
            view = any(r.alias_info is not None and not r.alias_info.is_write for r in operation._schema.returns)
            if (view or key == IN_PLACES or name in MAKERS) and operation not in BOTH:
                yield name, operation


def _save(tensor: torch.Tensor) -> tuple[torch.Tensor, bool]:
    """What autograd keeps of a tensor for the backward pass."""
    return (tensor.held, True) if isinstance(tensor, Held) else (tensor, False)


def _unsave(saved: tuple[torch.Tensor, bool]) -> torch.Tensor:
    """The tensor again. Of an operation's results autograd takes a copy that holds nothing; it has the same storage."""
    numbers, here = saved
    if not here:
        return numbers
    storage = (back := Held(numbers)).untyped_storage()._cdata
    UNSAVED.pop(storage, None)  # of one that has gone; what comes last stays longest
    UNSAVED[storage] = numbers
    if len(UNSAVED) > RECENT:
        UNSAVED.pop(next(iter(UNSAVED)))
    return back


def _register() -> list[torch.library.Library]:
    _setup_privateuseone_for_python_backend(TYPE, backend_module=Backend())
    # A module that moves must take the tensors that it is given: their numbers are no part of their storage.
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    every, one = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
    every.fallback(_compute, "PrivateUse1")
    for name, operation in _composed():
        one.impl(name, lambda *args, op=operation, **kwargs: _compute(op, *args, **kwargs), "PrivateUse1")
    one.impl("index.Tensor", _index, "PrivateUse1")
    one.impl("_index_put_impl_", _index_put, "PrivateUse1")
    one.impl("convolution_overrideable", lambda *args: _compute(aten.convolution.default, *args), "PrivateUse1")
    one.impl("convolution_backward_overrideable", _convolution_backward, "PrivateUse1")
    torch._C._autograd._push_saved_tensors_default_hooks(_save, _unsave)
    return [every, one]


LIBRARIES = _register()  # what they register ends with them
DEVICE = torch.device(TYPE, 0)
