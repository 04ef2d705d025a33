"""Where the milliseconds of a request go, by layer and by method: figures from plain numbers.

Both this package's report and the page of a device's profile draw them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat

from comp_edge.report import words
from comp_edge.report.theme import PHONE_WIDTH, color, role

Milliseconds = Annotated[FiniteFloat, Field(ge=0)]
# Attention has the deep shade of its stream, the feed-forward the light one.
PARTS = {"attention": "attention", "ffn": "feed-forward", "drop": "drop of tokens"}
REST = "outside the layers"


class LayerTime(BaseModel):
    """Milliseconds of one layer in one call of a method; the drop is the one before the layer."""

    model_config = ConfigDict(frozen=True, extra="ignore")
    method: str
    stream: str
    layer: Annotated[int, Field(ge=0, lt=2**16)]
    attention: Milliseconds
    ffn: Milliseconds
    drop: Milliseconds


class Run(NamedTuple):
    """The layers of a stream as one method runs them."""

    method: str
    stream: str


Models = Mapping[str, Sequence[LayerTime]]  # layers of every run, by what the model is called


def runs(models: Models) -> list[Run]:
    """What runs layers, in order."""
    return list(dict.fromkeys(Run(row.method, row.stream) for rows in models.values() for row in rows))


def layer_figure(models: Models, run: Run) -> Figure:
    """A row of bars for each model, one above the other on common axes; to draw within `theme.style`."""
    mine = {name: [row for row in rows if (row.method, row.stream) == run] for name, rows in models.items()}
    figure = Figure(figsize=(PHONE_WIDTH, 0.9 + 1.5 * len(mine)), layout="constrained")
    panels = figure.subplots(len(mine), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    for axes, (name, rows) in zip(panels, mine.items(), strict=True):
        _draw_layers(axes, rows, run.stream)
        axes.set_title(f"{words.ending(name, 40)}, {words.milliseconds(sum(map(_total, rows)))}", color=color("ink"))
    everything = [row for rows in mine.values() for row in rows]
    panels[-1].set_xlim(-0.6, max((row.layer for row in everything), default=0) + 0.6)
    panels[-1].set_ylim(0, 1.08 * max(map(_total, everything), default=0) or 1)
    panels[-1].set_xlabel("layer")
    panels[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    used = [part for part in PARTS if any(getattr(row, part) for row in everything)]
    _legend(figure, [(PARTS[part], _paint(run.stream, part)) for part in used])
    return figure


def _draw_layers(axes: Axes, rows: Sequence[LayerTime], stream: str) -> None:
    places, base = [row.layer for row in rows], [0.0] * len(rows)
    for part in PARTS:
        values = [getattr(row, part) for row in rows]
        axes.bar(places, values, bottom=base, width=0.72, color=_paint(stream, part), linewidth=0)
        base = [low + value for low, value in zip(base, values, strict=True)]
    axes.tick_params(length=0)
    axes.set_ylabel("ms")
    axes.yaxis.set_major_locator(MaxNLocator(4))
    axes.grid(axis="y")


def method_figure(methods: Mapping[str, Mapping[str, float]], layers: Models) -> Figure:
    """A stacked bar for each method and model, the models of a method one below the other.

    Args:
        methods: milliseconds of one call by method, by what the model is called.
        layers: what of that its layers take.
    """
    names = list(dict.fromkeys(method for parts in methods.values() for method in parts))
    height = 1.2 + sum(0.45 + 0.26 * sum(method in parts for parts in methods.values()) for method in names)
    figure = Figure(figsize=(PHONE_WIDTH, height), layout="constrained")
    axes, y, ticks, seen = figure.subplots(), 0.0, [], {}
    for method in names:
        axes.annotate(method, (0, y), xytext=(2, 0), textcoords="offset points", va="center", color=color("ink"))
        y += 0.9
        for model, parts in methods.items():
            if method not in parts:
                continue
            left = 0.0
            for label, paint, width in _segments(method, parts[method], layers.get(model, ())):
                axes.barh(y, width, left=left, height=0.74, color=paint, linewidth=0)
                left += width
                seen[label] = paint
            axes.annotate(
                words.milliseconds(parts[method]), (left, y), xytext=(5, 0), textcoords="offset points", va="center",
                color=color("muted"), fontsize="small",
            )  # fmt: skip
            ticks.append((y, words.ending(model, 20)))
            y += 1
        y += 0.4
    axes.set_yticks([place for place, _ in ticks], [text for _, text in ticks])
    axes.set_ylim(y - 0.7, -0.6)
    axes.set_xlim(0, 1.2 * max((ms for parts in methods.values() for ms in parts.values()), default=0) or 1)
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.tick_params(length=0)
    axes.set_xlabel("ms of one call")
    axes.grid(axis="x")
    _legend(figure, sorted(seen.items(), key=lambda item: (item[0] == REST, item[0] == PARTS["drop"])))
    return figure


def _segments(method: str, ms: float, rows: Iterable[LayerTime]) -> list[tuple[str, str, float]]:
    """Label, colour and milliseconds of what a method's time consists of; nothing is left out."""
    mine = [row for row in rows if row.method == method]
    found = []
    for stream in dict.fromkeys(row.stream for row in mine):
        for part, label in PARTS.items():
            value = sum(getattr(row, part) for row in mine if row.stream == stream)
            name = label if part == "drop" else f"{stream} {label}"
            found.append((name, _paint(stream, part), value))
    rest = ms - sum(value for *_, value in found)
    return [one for one in (*found, (REST, color("dense"), rest)) if one[2] > 0]


def _total(row: LayerTime) -> float:
    return row.attention + row.ffn + row.drop


def _paint(stream: str, part: str) -> str:
    if part == "drop":
        return color("ink")
    if role(stream) == "other":
        return color("params" if part == "attention" else "tokens")
    return color(f"{stream}_params" if part == "attention" else f"{stream}_tokens")


def _legend(figure: Figure, entries: Sequence[tuple[str, str]]) -> None:
    """Below the axes, in as many columns as fit."""
    widest = max((len(label) for label, _ in entries), default=0)
    columns = max(1, min(len(entries), int(figure.get_figwidth() / (0.5 + 0.085 * widest))))
    handles = [Patch(color=paint, label=label) for label, paint in entries]
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False, fontsize="small")
