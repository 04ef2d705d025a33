"""Lowering leaves the process as it was: settings of the toolchain, and no graph or weight that nobody needs."""

from __future__ import annotations

import gc
import logging
import weakref

import pytest
import torch
from torch import nn
from torch.fx import config
from torch.fx.traceback import NodeSource

from export.executorch.lower import Method, lower


def lower_once(shape: tuple[int, ...] = (1, 8)) -> weakref.ref:
    """Lower a small module; a reference to one of its weights."""
    module = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)).eval()
    lower({"forward": Method(module=module, inputs=(torch.zeros(shape),))}, constants={})
    return weakref.ref(module[0].weight)


def test_weights_can_go_when_a_program_is_made():
    weight = lower_once()
    gc.collect()
    assert weight() is None, "a dozen lowered models would fill the memory"


@pytest.mark.parametrize("shape", [(1, 8), (1, 9)], ids=["done", "failed"])
def test_settings_of_the_toolchain_are_put_back(shape):
    before = (config.do_not_emit_stack_traces, logging.root.manager.disable, gc.isenabled())
    if shape[-1] == 8:
        lower_once(shape)
    else:
        with pytest.raises(Exception, match="reduction dim"):
            lower_once(shape)
    assert before == (config.do_not_emit_stack_traces, logging.root.manager.disable, gc.isenabled())
    assert "__deepcopy__" not in vars(NodeSource)
