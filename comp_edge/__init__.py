"""comp-edge: prune the parameters and the tokens of a vision-language model together, until it fits a device."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from comp_edge.budget import Budget
    from comp_edge.checkpoint import load_pretrained, save_pretrained
    from comp_edge.cost import MacsCost, macs
    from comp_edge.errors import InputError
    from comp_edge.plan import Plan
    from comp_edge.pruning import prune
    from comp_edge.settings import PruneConfig, PruneResult
    from comp_edge.surgery import apply_plan

__version__ = "0.1.0"

_WHERE = {
    "Budget": "budget",
    "InputError": "errors",
    "MacsCost": "cost",
    "Plan": "plan",
    "PruneConfig": "settings",
    "PruneResult": "settings",
    "apply_plan": "surgery",
    "load_pretrained": "checkpoint",
    "macs": "cost",
    "prune": "pruning",
    "save_pretrained": "checkpoint",
}
__all__ = [
    "Budget",
    "InputError",
    "MacsCost",
    "Plan",
    "PruneConfig",
    "PruneResult",
    "apply_plan",
    "load_pretrained",
    "macs",
    "prune",
    "save_pretrained",
]


def __getattr__(name: str) -> Any:
    # torch and transformers take seconds to import; `comp-edge --help` should not.
    if name not in _WHERE:
        raise AttributeError(f"module 'comp_edge' has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(f"comp_edge.{_WHERE[name]}"), name)
    globals()[name] = value
    return value
