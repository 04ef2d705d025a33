"""The same architecture with fewer layers: what a layer costs is measured on models that are quickly made and run."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import transformers

from comp_edge.families import family_of
from comp_edge.structure import empty_model
from devices.errors import DeviceError

NAMES = ("num_hidden_layers", "depth")  # what transformers' configs call the number of layers


def config_from(values: Mapping[str, Any], *, where: str) -> Any:
    """A transformers configuration from JSON of a file that somebody else may have written.

    Raises:
        DeviceError: its model type is none that transformers and comp-edge know, or its values do not fit together.
    """
    kind = values.get("model_type")
    if not isinstance(kind, str) or kind not in transformers.CONFIG_MAPPING:
        raise DeviceError(
            f"{where} has model type {kind!r}, which transformers {transformers.__version__} does not know."
        )
    try:
        config = transformers.CONFIG_MAPPING[kind].from_dict(dict(values))
        family = family_of(config)
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise DeviceError(f"{where} has a config that cannot be used: {str(error).splitlines()[0]}.") from None
    config.architectures = config.architectures or [family.architectures[0]]
    return config


def with_layers(config: Any, layers: Mapping[str, int]) -> Any:
    """A copy of a configuration whose streams have so many layers; streams that are not named keep theirs.

    Args:
        layers: of "vision" and "language"; cross-attention lies between the layers of the text model and goes with them.

    Raises:
        DeviceError: a stream cannot have so many layers.
    """
    config = copy.deepcopy(config)
    model, family = empty_model(config), family_of(config)
    views = family.streams(model)
    have = {name: len(stream.layers) for name, stream in views.items()}
    for name, wanted in layers.items():
        if name not in have or not 1 <= wanted <= have[name]:
            raise DeviceError(f"{wanted} layers in stream {name!r} cannot be had; the model has {have}.")
        if views[name].follows:
            continue
        part = family.stream_config(SimpleNamespace(config=config), name)
        attribute = next(key for key in NAMES if hasattr(part, key))
        # LLaVA does not use its vision tower's last layer.
        before = getattr(part, attribute)
        after = before - have[name] + wanted
        setattr(part, attribute, after)
        for key, value in list(vars(part).items()):
            if isinstance(value, list) and len(value) == before:
                setattr(part, key, value[:after])
    return config
