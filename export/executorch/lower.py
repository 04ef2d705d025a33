"""From modules to a .pte: export, lower to XNNPACK, plan memory, and say what was left out of the backend."""

from __future__ import annotations

import gc
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from export.bundle import Delegation, MethodSpec


@dataclass(frozen=True)
class Method:
    """One method of a program: the module, inputs to trace it with, and what the manifest says of it, where there is one."""

    module: nn.Module
    inputs: tuple[torch.Tensor, ...]
    spec: MethodSpec | None = None
    dynamic_shapes: tuple[Any, ...] | None = None


@dataclass(frozen=True)
class Lowered:
    """A serialized program and where the operations of each method run."""

    program: bytes
    delegation: dict[str, Delegation]


def lower(methods: Mapping[str, Method], *, constants: Mapping[str, Any]) -> Lowered:
    """Lower methods into one program.

    Buffers that modules share under the same name are one memory in the program: that is how `prefill` and `decode` see
    the same caches. (The program must then be loaded through `executorch.runtime.Runtime` or a C++ `Module` with
    `share_memory_arenas=true`; each method otherwise silently gets memory of its own.)
    """
    with _lowering():
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.exir import EdgeCompileConfig, ExecutorchBackendConfig, to_edge_transform_and_lower
        from executorch.exir.passes import MemoryPlanningPass

        with torch.no_grad():
            programs = {
                name: torch.export.export(
                    method.module.eval(), method.inputs, dynamic_shapes=method.dynamic_shapes, strict=False
                )
                for name, method in methods.items()
            }
        edge = to_edge_transform_and_lower(
            programs,
            partitioner=[XnnpackPartitioner()],
            compile_config=EdgeCompileConfig(_check_ir_validity=False, _skip_dim_order=True),
            constant_methods=dict(constants),
        )
        delegation = {name: _delegation(edge.exported_program(name).graph_module) for name in methods}
        program = edge.to_executorch(
            ExecutorchBackendConfig(
                memory_planning_pass=MemoryPlanningPass(alloc_graph_input=False, share_mutable_buffers=True),
                emit_mutable_buffer_names=True,
            )
        )
    return Lowered(program=bytes(program.buffer), delegation=delegation)


def _delegation(graph_module: Any) -> Delegation:
    from executorch.devtools.backend_debug import get_delegation_info

    info = get_delegation_info(graph_module)
    others = {
        row.op_type: int(row.occurrences_in_non_delegated_graphs)
        for row in info.get_operator_delegation_dataframe().itertuples()
        if row.occurrences_in_non_delegated_graphs and row.op_type not in ("Total", "getitem")
    }
    return Delegation(delegates=info.num_delegated_subgraphs, delegated_ops=info.num_delegated_nodes, other_ops=others)


# What a drop and the integer inputs need: measured at 1-3 us each, against 5 us for a delegate call.
EXPECTED_OUTSIDE = {
    "aten_topk_default",
    "aten_index_select_default",
    "aten_view_copy_default",
    "aten_embedding_default",
    "aten__to_copy_default",
    "aten_eq_scalar",  # where a text ends
    # Dynamic shapes of the stock text decoder.
    "aten_slice_copy_tensor",
    "aten_add_tensor",
    "aten_unsqueeze_copy_default",
    "sym_size",
    "add",
    "mul",
}


def delegation_warnings(delegation: Mapping[str, Delegation]) -> list[str]:
    """One sentence for each method with operations outside XNNPACK that have no business there."""
    found = []
    for name, report in delegation.items():
        strangers = {op: count for op, count in report.other_ops.items() if op not in EXPECTED_OUTSIDE}
        if strangers:
            listed = ", ".join(f"{op} x{count}" for op, count in sorted(strangers.items()))
            found.append(f"{name}: {sum(strangers.values())} operations run outside XNNPACK: {listed}")
    return found


@contextmanager
def _lowering() -> Iterator[None]:
    """Keep the toolchain's own notices (deprecations, pass listings) off the user's terminal; errors still raise.

    Lowering makes millions of small objects that live until its end: without the cycle collector it is an eighth faster.
    """
    previous, collecting = logging.root.manager.disable, gc.isenabled()
    logging.disable(logging.WARNING)
    gc.disable()
    try:
        with warnings.catch_warnings(), _one_history():
            warnings.simplefilter("ignore")
            yield
    finally:
        _forget_graphs()
        logging.disable(previous)
        if collecting:
            gc.enable()


@contextmanager
def _one_history() -> Iterator[None]:
    """Let the nodes of a graph share what they came from, and note no stack traces: a fifth of lowering's time.

    Every pass of the toolchain copies the whole history of every node, deeply. A `NodeSource` is never changed once it is
    made, and nothing of this gets into the program.
    """
    from torch.fx import config
    from torch.fx.traceback import NodeSource

    noting = config.do_not_emit_stack_traces
    config.do_not_emit_stack_traces = True
    NodeSource.__deepcopy__ = lambda self, memo: self
    try:
        yield
    finally:
        del NodeSource.__deepcopy__
        config.do_not_emit_stack_traces = noting


def _forget_graphs() -> None:
    """Empty the two caches of the toolchain whose keys hold graphs, and with them all weights, until the process ends."""
    from executorch.exir.backend.utils import is_same_node
    from torch._subclasses.fake_tensor import FakeTensorMode

    is_same_node.cache_clear()
    FakeTensorMode.cache_clear()
