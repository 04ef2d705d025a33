"""Every operation that the interpreter knows."""

from export.mil import (
    ops_control,
    ops_elementwise,
    ops_index,
    ops_linear,
    ops_quantized,
    ops_reduction,
    ops_shape,
    ops_spatial,
)
from export.mil.registry import merge

HANDLERS = merge(
    module.HANDLERS
    for module in (
        ops_control,
        ops_elementwise,
        ops_index,
        ops_linear,
        ops_quantized,
        ops_reduction,
        ops_shape,
        ops_spatial,
    )
)
"""Handlers by op type."""
