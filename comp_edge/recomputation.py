"""Gradient checkpointing: layers keep no activations while training; the backward pass runs them a second time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from comp_edge.attention import CONTEXT
from comp_edge.errors import InputError
from comp_edge.families import family_of


class Recomputation:
    """transformers' gradient checkpointing on a model with a token schedule; active from construction to `detach`.

    transformers checkpoints the `forward` of a layer: hooks on the layer, which drop tokens and follow them through the
    pass, run once. What runs twice are the parts inside, and those depend on what the latest pass left on them: an
    attention module is given back the context of its own pass.

    A pass that is asked for its cache (`use_cache=True`) keeps the activations of its language layers: a second run would
    fill the cache twice, and transformers would therefore leave it empty.

    Raises:
        InputError: the model's layers cannot be run twice.
    """

    def __init__(self, model: Any) -> None:
        streams = family_of(model).streams(model)
        layers = [layer.module for stream in streams.values() if not stream.follows for layer in stream.layers]
        if not model.supports_gradient_checkpointing or not all(
            isinstance(layer, GradientCheckpointingLayer) for layer in layers
        ):
            raise InputError(f"{type(model).__name__} has layers without gradient checkpointing; leave it out.")
        self.model = model
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        model.disable_input_require_grads()  # what it turned on is for frozen embeddings and re-entrant checkpoints
        for stream in streams.values():
            for layer in stream.layers:
                if layer.attn is not None and not stream.follows:
                    again = partial(_contexts, layer.attn.module)
                    layer.module._gradient_checkpointing_func = partial(
                        checkpoint, use_reentrant=False, context_fn=again
                    )
        self._cached: list[nn.Module] = []
        self._handles: list[Any] = []
        if family_of(model).fusion(model) is not None:
            language = streams["language"]
            self._cached = [language.root, *(layer.module for layer in language.layers)]
            self._handles.append(model.register_forward_pre_hook(self._before_model, with_kwargs=True))

    def _before_model(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        for part in self._cached:
            part.gradient_checkpointing = kwargs.get("use_cache") is not True

    def detach(self) -> None:
        """Keep activations again."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.model.activation_checkpointing_disable()


def _contexts(attention: nn.Module) -> tuple[AbstractContextManager, AbstractContextManager]:
    """What surrounds a layer's first run (nothing) and its second: the context that its attention has now."""
    return nullcontext(), _given_back(attention, getattr(attention, CONTEXT, None))


@contextmanager
def _given_back(attention: nn.Module, context: Any) -> Iterator[None]:
    latest = getattr(attention, CONTEXT, None)
    setattr(attention, CONTEXT, context)
    try:
        yield
    finally:
        setattr(attention, CONTEXT, latest)
        if context is not None:
            context.take()  # the second run's scores are the first's
