"""Shapes, slices, joins: ops that move values without changing them."""

import math

import torch
from torch import Tensor

from export.mil.errors import ExecutionError
from export.mil.registry import Call, Handlers

HANDLERS = Handlers()

# -- shapes


@HANDLERS.op("shape")
def _shape(call: Call) -> Tensor:
    return torch.tensor(call.stored("x").shape, dtype=torch.int32)


@HANDLERS.op("reshape")
def _reshape(call: Call) -> Tensor:
    x, shape = call.stored("x"), call.ints("shape")
    if 0 in shape and len(shape) == x.dim():
        shape = [old if new == 0 else new for old, new in zip(x.shape, shape, strict=True)]
    return x.reshape(shape)


@HANDLERS.op("reshape_like")
def _reshape_like(call: Call) -> Tensor:
    shape: list[int] = []
    arguments = zip(
        call.many("ref_tensors"), call.many("begins"), call.many("ends"), call.many("end_masks"), strict=True
    )
    for reference, begin, end, to_end in arguments:
        shape += reference.shape[int(begin) :] if bool(to_end) else reference.shape[int(begin) : int(end)]
    return call.stored("x").reshape(shape)


@HANDLERS.op("flatten2d")
def _flatten2d(call: Call) -> Tensor:
    x, axis = call.stored("x"), call.scalar("axis", 1)
    return x.reshape(math.prod(x.shape[:axis]), math.prod(x.shape[axis:]))


@HANDLERS.op("transpose")
def _transpose(call: Call) -> Tensor:
    return call.stored("x").permute(call.ints("perm"))


@HANDLERS.op("expand_dims")
def _expand_dims(call: Call) -> Tensor:
    x, axes = call.stored("x"), call.ints("axes")
    rank = x.dim() + len(axes)
    for axis in sorted(axis % rank for axis in axes):
        x = x.unsqueeze(axis)
    return x


@HANDLERS.op("squeeze")
def _squeeze(call: Call) -> Tensor:
    x, axes = call.stored("x"), call.ints("axes", None)
    # Dimensions that are not 1 are left alone, as in torch.
    return x.squeeze() if axes is None else x.squeeze(tuple(axes))


@HANDLERS.op("reverse")
def _reverse(call: Call) -> Tensor:
    x = call.stored("x")
    return x.flip(call.ints("axes", list(range(x.dim()))))


@HANDLERS.op("tile")
def _tile(call: Call) -> Tensor:
    x, repeats = call.stored("x"), call.ints("reps")
    if len(repeats) != x.dim():
        raise ExecutionError(f"{len(repeats)} repeats for a tensor of rank {x.dim()}")
    return x.repeat(repeats)


@HANDLERS.op("sliding_windows")
def _sliding_windows(call: Call) -> Tensor:
    x = call.stored("x")
    axis = call.scalar("axis") % x.dim()
    return x.unfold(axis, call.scalar("size"), call.scalar("stride", 1)).movedim(-1, axis + 1)


# -- joins and splits


@HANDLERS.op("concat")
def _concat(call: Call) -> Tensor:
    values = [torch.atleast_1d(value) for value in call.many("values")]
    axis = call.scalar("axis") % values[0].dim()
    if call.scalar("interleave", False):
        return torch.stack(values, axis + 1).flatten(axis, axis + 1)
    return torch.cat(values, axis)


@HANDLERS.op("stack")
def _stack(call: Call) -> Tensor:
    return torch.stack(call.many("values"), call.scalar("axis"))


@HANDLERS.op("split")
def _split(call: Call) -> list[Tensor]:
    x, axis = call.stored("x"), call.scalar("axis")
    sizes = call.ints("split_sizes", None)
    if sizes is None:
        count = call.scalar("num_splits")
        if x.shape[axis] % count:
            raise ExecutionError(f"{x.shape[axis]} values cannot be split into {count} equal parts")
        sizes = [x.shape[axis] // count] * count
    return list(x.split(sizes, axis))


# -- slices


def _slices(call: Call, x: Tensor) -> tuple[list[range], list[int]]:
    """Positions per dimension that a slice selects, and dimensions it removes. Bounds are as in Python."""
    begin, end = call.ints("begin"), call.ints("end")
    off = [False] * x.dim()
    stride = call.ints("stride", [1] * x.dim())
    begin_mask, end_mask = call.flags("begin_mask", off), call.flags("end_mask", off)
    squeeze = call.flags("squeeze_mask", off)
    positions = []
    for d, size in enumerate(x.shape):
        if squeeze[d]:
            # begin_mask stands for position 0 (the last one going backwards) here, too.
            at = begin[d] if not begin_mask[d] else (0 if stride[d] > 0 else -1)
            if not -size <= at < size:
                raise ExecutionError(f"index {at} of dimension {d}, which has {size} values")
            positions.append(range(at % size, at % size + 1))
        else:
            bounds = slice(None if begin_mask[d] else begin[d], None if end_mask[d] else end[d], stride[d])
            positions.append(range(*bounds.indices(size)))
    return positions, [d for d in range(x.dim()) if squeeze[d]]


def _take(x: Tensor, positions: list[range]) -> Tensor:
    for d, selected in enumerate(positions):
        if selected.step > 0:
            x = x[(slice(None),) * d + (slice(selected.start, max(selected.stop, selected.start), selected.step),)]
        else:  # torch has no negative steps
            x = x.index_select(d, torch.tensor(list(selected), dtype=torch.long))
    return x


@HANDLERS.op("slice_by_index")
def _slice_by_index(call: Call) -> Tensor:
    x = call.stored("x")
    positions, squeezed = _slices(call, x)
    x = _take(x, positions)
    return x.squeeze(tuple(squeezed)) if squeezed else x


@HANDLERS.op("slice_by_size")
def _slice_by_size(call: Call) -> Tensor:
    x = call.stored("x")
    for d, (begin, size) in enumerate(zip(call.ints("begin"), call.ints("size"), strict=True)):
        begin = begin + x.shape[d] if begin < 0 else begin
        x = x.narrow(d, begin, x.shape[d] - begin if size == -1 else size)
    return x


@HANDLERS.op("slice_update")
def _slice_update(call: Call) -> Tensor:
    x, update = call.stored("x").clone(), call.stored("update")
    positions, squeezed = _slices(call, x)
    sizes = [len(selected) for selected in positions]
    kept = [size for d, size in enumerate(sizes) if d not in squeezed]
    if list(update.shape) != kept:
        raise ExecutionError(f"the update has shape {list(update.shape)}, the slice {kept}")
    index = torch.meshgrid(*(torch.tensor(list(p), dtype=torch.long) for p in positions), indexing="ij")
    x[index] = update.reshape(sizes).to(x.dtype)
    return x


# -- padding and filling


@HANDLERS.op("pad")
def _pad(call: Call) -> Tensor:
    x, pad, mode = call.stored("x"), call.ints("pad"), call.text("mode", "constant")
    first = x.dim() - len(pad) // 2  # the last dimensions are padded
    if len(pad) % 2 or first < 0 or min(pad, default=0) < 0:
        raise ExecutionError(f"the padding {pad} does not fit a tensor of rank {x.dim()}")
    if mode == "constant":
        value = call.scalar("constant_val", 0)
        shape = [size + (sum(pad[2 * (d - first) :][:2]) if d >= first else 0) for d, size in enumerate(x.shape)]
        y = torch.full(shape, value, dtype=x.dtype)
        inner = tuple(
            slice(pad[2 * (d - first)], pad[2 * (d - first)] + size) if d >= first else slice(None)
            for d, size in enumerate(x.shape)
        )
        y[inner] = x
        return y
    for d in range(first, x.dim()):
        before, after = pad[2 * (d - first) :][:2]
        x = x.index_select(d, _padded_positions(x.shape[d], before, after, mode))
    return x


def _padded_positions(size: int, before: int, after: int, mode: str) -> Tensor:
    positions = torch.arange(-before, size + after)
    if mode == "replicate":
        return positions.clamp(0, size - 1)
    if mode != "reflect":
        raise ExecutionError(f"unknown mode '{mode}'")
    if max(before, after) > size - 1:
        raise ExecutionError(f"{max(before, after)} values cannot be reflected from {size}")
    positions = positions.abs()
    return torch.where(positions < size, positions, 2 * (size - 1) - positions)


@HANDLERS.op("fill")
def _fill(call: Call) -> Tensor:
    return _filled(call, call.ints("shape"))


@HANDLERS.op("fill_like")
def _fill_like(call: Call) -> Tensor:
    return _filled(call, list(call.stored("ref_tensor").shape))


def _filled(call: Call, shape: list[int]) -> Tensor:
    value = call.stored("value", torch.tensor(0.0))
    return value.reshape(()).expand(shape).clone()


@HANDLERS.op("range_1d")
def _range_1d(call: Call) -> Tensor:
    start, end, step = call.scalar("start"), call.scalar("end"), call.scalar("step")
    dtype = torch.float32 if call.stored("start").is_floating_point() else torch.int32
    return torch.arange(start, end, step, dtype=dtype)


@HANDLERS.op("band_part")
def _band_part(call: Call) -> Tensor:
    x, lower, upper = call.stored("x"), call.scalar("lower", -1), call.scalar("upper", -1)
    below = torch.arange(x.shape[-2])[:, None] - torch.arange(x.shape[-1])[None, :]
    inside = torch.ones_like(below, dtype=torch.bool)
    if lower >= 0:
        inside &= below <= lower
    if upper >= 0:
        inside &= -below <= upper
    return torch.where(inside, x, torch.zeros_like(x))
