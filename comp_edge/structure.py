"""Models without weights: what a config alone says."""

from __future__ import annotations

from typing import Any

from comp_edge.errors import InputError


def empty_model(config: Any) -> Any:
    """The class that `config.architectures` names, parameters on the meta device, buffers real, tied weights tied.

    Raises:
        InputError: the config names no class that transformers has.
    """
    import transformers
    from accelerate import init_empty_weights
    from transformers.initialization import no_init_weights

    name = (config.architectures or [None])[0]
    kind = getattr(transformers, name, None) if isinstance(name, str) else None
    if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
        raise InputError(f"config names architecture {name!r}, which transformers {transformers.__version__} lacks.")
    # Drawing random weights that have no storage takes longer than all the rest of loading.
    with no_init_weights(), init_empty_weights(include_buffers=False):
        model = kind(config)
    # Moving them to the meta device one by one has given tied parameters a copy each.
    model.tie_weights()
    return model
