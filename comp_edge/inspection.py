"""What a model is made of, as far as pruning is concerned; from its config alone, no weights are read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers

from comp_edge.checkpoint import CONFIG_FILE, RANDOM, is_pruned, load_structure, resolve
from comp_edge.cost import DEFAULT_PROMPT_TOKENS, MacsCost
from comp_edge.errors import InputError
from comp_edge.families import family_of
from comp_edge.families.base import Family, StreamView
from comp_edge.files import read_json
from comp_edge.plan import StreamPlan, plan_of
from comp_edge.reference.shapes import shape_config
from comp_edge.structure import empty_model
from comp_edge.units import dense_plan


def structure(ref: str | Path) -> Any:
    """The model that a reference names, its parameters without storage: shrunk and scheduled where it was pruned.

    Args:
        ref: a reference model, a folder, a hub id (of which the config alone is fetched), `random:SHAPE`, or a `config.json`.

    Raises:
        InputError: nothing of this name, or an architecture that no family knows.
    """
    path = Path(ref)
    if path.is_file():
        return _empty(_config_of(read_json(path, what="config"), str(path)))
    source = resolve(ref)
    if isinstance(source, str) and source.startswith(RANDOM):
        return empty_model(shape_config(source.removeprefix(RANDOM)))
    if is_pruned(ref):
        return load_structure(source)
    if isinstance(source, Path):
        return _empty(_config_of(read_json(source / CONFIG_FILE, what="config"), str(source)))
    try:
        return _empty(transformers.AutoConfig.from_pretrained(source))
    except (OSError, ValueError) as error:
        raise InputError(f"the config of {source!r} cannot be fetched: {str(error).splitlines()[0]}.") from None


def _empty(config: Any) -> Any:
    family = family_of(config)
    config.architectures = config.architectures or [family.architectures[0]]
    return empty_model(config)


def _config_of(values: Any, where: str) -> Any:
    if not isinstance(values, dict) or values.get("model_type") not in transformers.CONFIG_MAPPING:
        found = values.get("model_type") if isinstance(values, dict) else values
        raise InputError(f"config {where!r} has unknown model type {found!r}.")
    return transformers.CONFIG_MAPPING[values["model_type"]].from_dict(values)


def inspect(model: Any, *, prompt_tokens: int = DEFAULT_PROMPT_TOKENS, decode_tokens: int = 0) -> dict[str, Any]:
    """Streams, units, widths, where tokens can be dropped, and MACs by part.

    Args:
        model: live or without storage.
        prompt_tokens: text of the request that is counted, for a dense model; a pruned one has it in its plan.
        decode_tokens: generated tokens to count in.
    """
    family = family_of(model)
    plan = plan_of(model) or dense_plan(model, base="", prompt_tokens=prompt_tokens)
    return {
        "model_type": family.model_type,
        "architecture": type(model).__name__,
        "pruned": plan_of(model) is not None,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "modes": list(family.modes(model)),
        "streams": {
            name: _stream(family, model, stream, plan.streams[name]) for name, stream in family.streams(model).items()
        },
        "images": plan.images,
        "macs": MacsCost(model, decode_tokens=decode_tokens).parts(plan),
        "decode_tokens": decode_tokens,
    }


def _stream(family: Family, model: Any, stream: StreamView, planned: StreamPlan) -> dict[str, Any]:
    shape = family.shape(model, stream.name)
    layers = [
        {
            "heads": layer.attn.heads if layer.attn else 0,
            "kv_heads": layer.attn.kv_heads if layer.attn else 0,
            "ffn": layer.mlp.channels if layer.mlp else 0,
            "tokens": tokens,
            "windowed": bool(layer.attn and layer.attn.windowed),
        }
        for layer, tokens in zip(stream.layers, planned.tokens, strict=True)
    ]
    return {
        "width": stream.width,
        "head_dim": shape.head_dim,
        "causal": stream.causal,
        "protected": stream.protected,
        "layers": layers,
        "drops_before_layers": list(stream.drops),
        "drops_behind_connector": stream.hands_over,
        "delivered": planned.delivered,
        "follows": stream.follows,
        "heads_separable": all(layer.attn.separable for layer in stream.layers if layer.attn is not None),
    }
