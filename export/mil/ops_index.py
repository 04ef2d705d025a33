"""Gathers, scatters, sorting and one-hot vectors.

Core ML leaves the result of an index out of bounds undefined. Here it is an error, because a verification
must not depend on it. From iOS 17 on negative indices are out of bounds; before, they count from the end.
"""

import math

import torch
from torch import Tensor

from export.mil.errors import ExecutionError
from export.mil.registry import Call, Handlers

HANDLERS = Handlers()


def _bounded(call: Call, indices: Tensor, size: int) -> Tensor:
    """Indices as int64 in [0, size). Raises: ExecutionError when one is out of bounds in this opset."""
    indices = indices.long()
    if indices.numel():
        low, high = int(indices.min()), int(indices.max())
        lowest = 0 if call.ios >= 17 else -size
        if low < lowest or high >= size:
            raise ExecutionError(f"indices in [{low}, {high}] are out of bounds for {size} values")
        if low < 0:
            indices = torch.where(indices < 0, indices + size, indices)
    return indices


# -- gathers


@HANDLERS.op("gather")
def _gather(call: Call) -> Tensor:
    x = call.stored("x")
    axis, batch_dims = call.scalar("axis", 0) % x.dim(), call.scalar("batch_dims", 0)
    indices = _bounded(call, call.stored("indices"), x.shape[axis])
    if not 0 <= batch_dims <= min(axis, indices.dim()):
        raise ExecutionError(f"batch_dims {batch_dims} for axis {axis} and indices of rank {indices.dim()}")
    if batch_dims == 0:
        return _take(x, indices, axis)
    batch = x.shape[:batch_dims]
    xs = x.reshape(math.prod(batch), *x.shape[batch_dims:])
    rows = indices.reshape(math.prod(batch), *indices.shape[batch_dims:])
    taken = torch.stack([_take(a, i, axis - batch_dims) for a, i in zip(xs, rows, strict=True)])
    return taken.reshape(*batch, *taken.shape[1:])


def _take(x: Tensor, indices: Tensor, axis: int) -> Tensor:
    taken = x.index_select(axis, indices.reshape(-1))
    return taken.reshape(x.shape[:axis] + indices.shape + x.shape[axis + 1 :])


@HANDLERS.op("gather_along_axis")
def _gather_along_axis(call: Call) -> Tensor:
    x = call.stored("x")
    axis, indices = call.scalar("axis", 0) % x.dim(), call.stored("indices")
    _check_like(indices, x, axis)
    return x.gather(axis, _bounded(call, indices, x.shape[axis]))


@HANDLERS.op("gather_nd")
def _gather_nd(call: Call) -> Tensor:
    x, indices, batch_dims = call.stored("x"), call.stored("indices"), call.scalar("batch_dims", 0)
    batch = x.shape[:batch_dims]
    if indices.shape[:batch_dims] != batch:
        raise ExecutionError(f"batch_dims {batch_dims} for shapes {list(x.shape)} and {list(indices.shape)}")
    xs = x.reshape(math.prod(batch), *x.shape[batch_dims:])
    rows = indices.reshape(math.prod(batch), *indices.shape[batch_dims:])
    taken = torch.stack([a[_position(call, i, a.shape)] for a, i in zip(xs, rows, strict=True)])
    return taken.reshape(*batch, *taken.shape[1:])


def _position(call: Call, indices: Tensor, shape: torch.Size) -> tuple[Tensor, ...]:
    """[..., K] -> K index tensors for the first K dimensions of `shape`."""
    if indices.shape[-1] > len(shape):
        raise ExecutionError(f"{indices.shape[-1]} indices for a tensor of rank {len(shape)}")
    return tuple(_bounded(call, i, shape[d]) for d, i in enumerate(indices.unbind(-1)))


def _check_like(indices: Tensor, x: Tensor, axis: int) -> None:
    if indices.dim() != x.dim() or any(d != axis and indices.shape[d] != x.shape[d] for d in range(x.dim())):
        raise ExecutionError(f"indices of shape {list(indices.shape)} along axis {axis} of {list(x.shape)}")


# -- scatters


@HANDLERS.op("scatter")
def _scatter(call: Call) -> Tensor:
    data = call.stored("data")
    axis = call.scalar("axis", 0) % data.dim()
    indices = _bounded(call, call.stored("indices"), data.shape[axis])
    return _combine(call, _positions(data).index_select(axis, indices))


@HANDLERS.op("scatter_along_axis")
def _scatter_along_axis(call: Call) -> Tensor:
    data, indices = call.stored("data"), call.stored("indices")
    axis = call.scalar("axis", 0) % data.dim()
    _check_like(indices, data, axis)
    return _combine(call, _positions(data).gather(axis, _bounded(call, indices, data.shape[axis])))


@HANDLERS.op("scatter_nd")
def _scatter_nd(call: Call) -> Tensor:
    data = call.stored("data")
    return _combine(call, _positions(data)[_position(call, call.stored("indices"), data.shape)])


def _positions(data: Tensor) -> Tensor:
    """The flat position of every value, in the shape of `data`."""
    return torch.arange(data.numel()).reshape(data.shape)


def _combine(call: Call, positions: Tensor) -> Tensor:
    """Writes `updates` to the flat positions of `data`."""
    data, updates, mode = call.operand("data"), call.operand("updates"), call.text("mode", "add")
    if updates.shape != positions.shape:
        raise ExecutionError(f"the updates have shape {list(updates.shape)}, expected {list(positions.shape)}")
    flat, where, source = data.reshape(-1), positions.reshape(-1), updates.reshape(-1)
    if mode == "update":
        if where.unique().numel() != where.numel():
            raise ExecutionError("one value is updated twice; which update Core ML keeps is not specified")
        result = flat.scatter(0, where, source)
    elif mode in ("add", "sub"):
        result = flat.scatter_add(0, where, source if mode == "add" else -source)
    elif mode in ("mul", "max", "min"):
        how = {"mul": "prod", "max": "amax", "min": "amin"}[mode]
        result = flat.scatter_reduce(0, where, source, how)
    elif mode == "div" and flat.is_floating_point():
        result = flat / torch.ones_like(flat).scatter_reduce(0, where, source, "prod")
    else:
        raise ExecutionError(f"the mode '{mode}' is not supported for {data.dtype}")
    return result.reshape(data.shape)


# -- sorting and searching


@HANDLERS.op("topk")
def _topk(call: Call) -> list[Tensor]:
    # Which of several equal values comes first is not specified; here it is the one with the lower index.
    x, axis, k = call.stored("x"), call.scalar("axis", -1), call.scalar("k", 1)
    values, indices = torch.sort(x, dim=axis, descending=not call.scalar("ascending", False), stable=True)
    values, indices = values.narrow(axis, 0, k), indices.narrow(axis, 0, k)
    return [values, indices] if call.scalar("return_indices", True) else [values]


@HANDLERS.op("argsort")
def _argsort(call: Call) -> Tensor:
    descending = not call.scalar("ascending", False)
    return torch.sort(call.stored("x"), dim=call.scalar("axis", -1), descending=descending, stable=True).indices


@HANDLERS.op("non_zero")
def _non_zero(call: Call) -> Tensor:
    return call.stored("x").nonzero()


@HANDLERS.op("one_hot")
def _one_hot(call: Call) -> Tensor:
    indices, size, axis = call.stored("indices"), call.scalar("one_hot_vector_size"), call.scalar("axis", -1)
    on, off = call.stored("on_value", _INT_ONE), call.stored("off_value", _INT_ZERO)
    hot = indices.unsqueeze(-1) == torch.arange(size, dtype=indices.dtype)
    return torch.where(hot, on.reshape(()), off.reshape(())).movedim(-1, axis)


_INT_ONE = torch.tensor(1, dtype=torch.int32)
_INT_ZERO = torch.tensor(0, dtype=torch.int32)
