"""Resizing images and moving values between channels and space. Tensors are [N, C, H, W]."""

import torch.nn.functional as F
from torch import Tensor

from export.mil.errors import ExecutionError
from export.mil.registry import Call, Handlers

HANDLERS = Handlers()


@HANDLERS.op("pixel_shuffle")
def _pixel_shuffle(call: Call) -> Tensor:
    return F.pixel_shuffle(call.stored("x"), call.scalar("upscale_factor"))


@HANDLERS.op("pixel_unshuffle")
def _pixel_unshuffle(call: Call) -> Tensor:
    return F.pixel_unshuffle(call.stored("x"), call.scalar("downscale_factor"))


@HANDLERS.op("space_to_depth")
def _space_to_depth(call: Call) -> Tensor:
    x, block = call.stored("x"), call.scalar("block_size")
    n, c, h, w = x.shape
    x = x.reshape(n, c, h // block, block, w // block, block).permute(0, 3, 5, 1, 2, 4)
    return x.reshape(n, c * block * block, h // block, w // block)


@HANDLERS.op("depth_to_space")
def _depth_to_space(call: Call) -> Tensor:
    x, block = call.stored("x"), call.scalar("block_size")
    n, c, h, w = x.shape
    x = x.reshape(n, block, block, c // (block * block), h, w).permute(0, 3, 4, 1, 5, 2)
    return x.reshape(n, c // (block * block), h * block, w * block)


@HANDLERS.op("upsample_nearest_neighbor")
def _upsample_nearest(call: Call) -> Tensor:
    x = call.stored("x")
    for axis, name in ((2, "scale_factor_height"), (3, "scale_factor_width")):
        factor = call.scalar(name, 1)
        if factor != int(factor):
            raise ExecutionError(f"{name} is {factor}; what Core ML repeats is specified for whole factors only")
        x = x.repeat_interleave(int(factor), axis)
    return x


@HANDLERS.op("upsample_bilinear")
def _upsample_bilinear(call: Call) -> Tensor:
    align_corners = call.scalar("align_corners", True)
    if not align_corners and not call.scalar("half_pixel_centers", True):
        raise ExecutionError("align_corners and half_pixel_centers are both false, which is not supported")
    factors = (float(call.scalar("scale_factor_height", 1)), float(call.scalar("scale_factor_width", 1)))
    x = call.operand("x")
    return F.interpolate(x, scale_factor=factors, mode="bilinear", align_corners=align_corners)
