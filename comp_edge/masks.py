"""Masks on units that fade smoothly, put in front of the projections that units feed into."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from comp_edge.families.base import StreamView
from comp_edge.units import Site, sites, unit_count


class UnitMasks:
    """One mask a sub-layer, [units], multiplied onto the input of its output projection; 1 keeps, 0 removes.

    Removing the units whose mask is 0 leaves the model's function as it is (`surgery`), since they add nothing.

    Attributes:
        masks: per site; replace values freely. A site that is missing is not masked.
    """

    def __init__(self, streams: Mapping[str, StreamView]) -> None:
        self.streams = streams
        self.masks: dict[Site, Tensor] = {}
        self._handles: list[Any] = []
        self.unit_sizes: dict[Site, int] = {}
        for site in sites(streams):
            self.unit_sizes[site] = self.sink(site).in_features // unit_count(streams, site)
            self._handles.append(self.sink(site).register_forward_pre_hook(self._hook(site)))

    def sink(self, site: Site) -> nn.Linear:
        """The projection that the units of a site feed into."""
        layer = self.streams[site.stream].layers[site.layer]
        return layer.attn.out if site.kind == "heads" else layer.mlp.down

    def _hook(self, site: Site) -> Callable:
        def multiply(module: nn.Module, args: tuple) -> tuple | None:
            mask = self.masks.get(site)
            if mask is None:
                return None
            # Repeated before it is rounded: gradients of a unit's channels are then added up in the mask's precision.
            return (args[0] * mask.repeat_interleave(self.unit_sizes[site]).to(args[0].dtype), *args[1:])

        return multiply

    def device(self, site: Site) -> torch.device:
        """Where the mask of a site is wanted."""
        return self.sink(site).weight.device

    def detach(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
