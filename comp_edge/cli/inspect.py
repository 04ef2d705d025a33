"""`comp-edge inspect`: streams, units, widths, drop points and MACs of a model, from its config alone."""

from __future__ import annotations

import itertools
from typing import Any

from comp_edge.cli import common

EXAMPLES = """\
examples:
  comp-edge inspect llava-digits
  comp-edge inspect HuggingFaceTB/SmolVLM-256M-Instruct --json     fetches the config, not the weights
  comp-edge inspect pruned                                         what a pruned folder has left
  comp-edge inspect path/to/config.json --prompt-tokens 48 --decode-tokens 32
  comp-edge inspect random:qwen2.5-vl-3b                           a genuine shape that comes with comp-edge
  comp-edge inspect --list                                         families and shapes
"""


def add(subparsers: Any) -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "inspect",
        help="show what can be pruned in a model",
        description="Show a model's streams, units, widths, drop points and MACs; no weights are read.",
        epilog=EXAMPLES,
    )
    parser.add_argument("model", nargs="?", help=f"{common.MODEL_HELP}, or a config.json")
    parser.add_argument("--list", action="store_true", help="list the supported families and the shapes")
    parser.add_argument(
        "--prompt-tokens", type=common.count, metavar="N", help="text of the request to count (default: 32)"
    )
    parser.add_argument("--decode-tokens", type=common.natural, default=0, help="generated tokens to count in")
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    parser.set_defaults(run=run)


def run(arguments: Any) -> None:
    """Inspect, or list."""
    from comp_edge.cost import DEFAULT_PROMPT_TOKENS
    from comp_edge.errors import InputError
    from comp_edge.inspection import inspect, structure

    if arguments.list:
        _list(arguments.json)
        return
    if arguments.model is None:
        raise InputError("no model was given; name one, or give --list to see what is supported.")
    found = inspect(
        structure(arguments.model),
        prompt_tokens=arguments.prompt_tokens or DEFAULT_PROMPT_TOKENS,
        decode_tokens=arguments.decode_tokens,
    )
    found = {"model": arguments.model} | found
    if arguments.json:
        common.print_json(found)
    else:
        _print(found)


def _list(as_json: bool) -> None:
    from rich.console import Console
    from rich.table import Table

    from comp_edge.families import FAMILIES
    from comp_edge.reference.shapes import SHAPES

    families = {name: list(family.architectures) for name, family in sorted(FAMILIES.items())}
    if as_json:
        shapes = {name: {"hub_id": shape.hub_id, "parameters": shape.parameters} for name, shape in SHAPES.items()}
        common.print_json({"families": families, "shapes": shapes})
        return
    console = Console()
    table = Table(title="families")
    table.add_column("model type")
    table.add_column("architectures")
    for name, architectures in families.items():
        table.add_row(name, "\n".join(architectures))
    console.print(table)
    table = Table(title="shapes (random:NAME has random weights)")
    for column in ("name", "parameters", "what it is"):
        table.add_column(column, justify="right" if column == "parameters" else "left")
    for name, shape in SHAPES.items():
        table.add_row(name, f"{shape.parameters / 1e6:,.0f} M", shape.note)
    console.print(table)


def _print(found: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    kind = "pruned" if found["pruned"] else "dense"
    console.print(
        f"[bold]{found['model']}[/]: {found['architecture']} ({found['model_type']}, {kind}), "
        f"{found['parameters'] / 1e6:,.2f} M parameters",
        highlight=False,
        soft_wrap=True,
    )
    table = Table()
    for column in ("stream", "layers", "width", "heads", "FFN", "tokens"):
        table.add_column(column)
    for name, stream in found["streams"].items():
        for first, last, layer in _runs(stream["layers"]):
            table.add_row(
                name if first == 0 else "",
                str(first) if first == last else f"{first}-{last}",
                str(stream["width"]) if first == 0 else "",
                _heads(layer, stream["head_dim"]),
                str(layer["ffn"]) if layer["ffn"] else "-",
                str(layer["tokens"]),
            )
    console.print(table)
    for name, stream in found["streams"].items():
        console.print(f"{name} tokens may be dropped {_drops(stream)}; {_protected(stream)}.", highlight=False)
    table = Table(title="multiply-accumulates of a request")
    for column in ("part", "MACs", "share"):
        table.add_column(column, justify="left" if column == "part" else "right")
    macs = dict(found["macs"])
    total = macs.pop("total")
    derived = {name: macs.pop(name) for name in ("prefill", "decode_per_token")}
    for name, value in macs.items():
        table.add_row(name, f"{value / 1e6:,.1f} M", f"{value / total:.1%}")
    if found["decode_tokens"]:
        decoded = total - sum(macs.values())
        table.add_row(f"{found['decode_tokens']} more tokens", f"{decoded / 1e6:,.1f} M", f"{decoded / total:.1%}")
    table.add_row("total", f"{total / 1e6:,.1f} M", "", style="bold")
    console.print(table)
    console.print(
        f"everything behind the vision stream up to the first token: {derived['prefill'] / 1e6:,.1f} M; one more token: "
        f"{derived['decode_per_token'] / 1e6:,.1f} M\nmodes: {', '.join(found['modes'])}",
        highlight=False,
        soft_wrap=True,
    )


def _runs(layers: list[dict[str, Any]]) -> list[tuple[int, int, dict[str, Any]]]:
    """Neighbouring layers that are alike, as (first, last, layer)."""
    found, at = [], 0
    for layer, group in itertools.groupby(layers):
        size = len(list(group))
        found.append((at, at + size - 1, layer))
        at += size
    return found


def _heads(layer: dict[str, Any], head_dim: int) -> str:
    if not layer["heads"]:
        return "-"
    grouped = f"{layer['heads']} / {layer['kv_heads']}" if layer["kv_heads"] != layer["heads"] else str(layer["heads"])
    return f"{grouped} x {head_dim}" + (", windowed" if layer["windowed"] else "")


def _drops(stream: dict[str, Any]) -> str:
    if stream["follows"]:
        return f"where those of {stream['follows']} are"
    if stream["drops_behind_connector"]:
        return f"behind the connector ({stream['delivered']} an image go on)"
    before = stream["drops_before_layers"]
    return f"before layers {before[0]}-{before[-1]}" if before else "nowhere"


def _protected(stream: dict[str, Any]) -> str:
    names = {
        "first": "the first (CLS) stays", "last": "the last of the prompt stays", "final": "the last position stays",
        "end": "the end of the text stays", "none": "any may go",
    }  # fmt: skip
    return names[stream["protected"]]
