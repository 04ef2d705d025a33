"""The pictures: score over reduction, which mode removed what, and what the selection cost."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean, median
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import PercentFormatter

from comp_edge.bench.method.statistics import Record, summary, unique
from comp_edge.bench.method.table import percent, ratios
from comp_edge.report.theme import color, png, style

DPI = 160
PANEL = 4.6  # inches
# Methods are told apart by marker as well; ours is drawn last and thick.
OURS = "#1f6f5c"
OTHERS = ("#c2571a", "#7b5aa6", "#3f7fbf", "#a8842c", "#b5476b", "#5d6b78", "#8a5a3c", "#4c9a9a", "#9a9a3f", "#777777")
MARKERS = "osD^vP<>X*"
NUDGE = 0.004  # error bars of different methods at one reduction stand side by side


def pictures(cells: Sequence[Record], *, ours: str) -> dict[str, bytes]:
    """PNG files by name; none without cells."""
    if not cells:
        return {}
    with style():
        figures = {
            "accuracy.png": accuracy_figure(cells, ours=ours),
            "modes.png": modes_figure(cells),
            "selection.png": selection_figure(cells),
        }
        return {name: png(figure, dpi=DPI) for name, figure in figures.items()}


def accuracy_figure(cells: Sequence[Record], *, ours: str) -> Figure:
    """Test score over reduction, mean and standard deviation, one panel a model."""
    models, methods = unique(cells, "model"), unique(cells, "strategy")
    paints = method_paints(methods, ours=ours)
    figure = Figure(figsize=(PANEL * len(models) + 0.4, 4.4), layout="constrained")
    panels = figure.subplots(1, len(models), squeeze=False)[0]
    for axes, model in zip(panels, models, strict=True):
        mine = [cell for cell in cells if cell["model"] == model]
        _draw_accuracy(axes, mine, methods, paints, ours)
        axes.set_title(model, color=color("ink"))
    panels[0].set_ylabel("test score")
    handles = [_line(method, paints, ours) for method in methods]
    handles.append(Line2D([], [], color=color("muted"), dashes=(4, 3), linewidth=1.2, label="dense"))
    _legend(figure, handles)
    return figure


def _legend(figure: Figure, handles: Sequence[Any]) -> None:
    """Below the panels, in as many columns as the figure is wide enough for."""
    widest = max((len(handle.get_label()) for handle in handles), default=0)
    fit = int(figure.get_figwidth() / (0.7 + 0.085 * widest))
    figure.legend(handles=handles, loc="outside lower center", ncols=max(1, min(fit, len(handles))), frameon=False)


def method_paints(methods: Sequence[str], *, ours: str) -> dict[str, tuple[str, str]]:
    """Colour and marker of each method."""
    others = [method for method in methods if method != ours]
    found = {m: (OTHERS[i % len(OTHERS)], MARKERS[1 + i % (len(MARKERS) - 1)]) for i, m in enumerate(others)}
    return found | {ours: (OURS, MARKERS[0])}


def _line(method: str, paints: dict[str, tuple[str, str]], ours: str) -> Line2D:
    paint, marker = paints[method]
    width = 2.4 if method == ours else 1.4
    return Line2D([], [], color=paint, marker=marker, markersize=5, linewidth=width, label=method)


def _draw_accuracy(
    axes: Axes, cells: Sequence[Record], methods: Sequence[str], paints: dict[str, tuple[str, str]], ours: str
) -> None:
    rows = summary(cells)
    dense = fmean({cell["dense_seed"]: cell["dense_score"] for cell in cells}.values())
    axes.axhline(dense, color=color("muted"), linewidth=1.2, dashes=(4, 3), zorder=1)
    for place, method in enumerate(methods):
        found = [(r, value) for (_, m, r), value in rows.items() if m == method]
        if not found:
            continue
        line = _line(method, paints, ours)
        axes.errorbar(
            [r + NUDGE * (place - (len(methods) - 1) / 2) for r, _ in found], [value.mean for _, value in found],
            yerr=[np.nan_to_num(value.std) for _, value in found], color=line.get_color(), marker=line.get_marker(),
            markersize=5, linewidth=line.get_linewidth(), elinewidth=1, capsize=2, zorder=4 if method == ours else 3,
        )  # fmt: skip
    reductions = unique(cells, "reduction")
    axes.set_xticks(reductions, [percent(reduction) for reduction in reductions])
    axes.set_xlabel("reduction of MACs")
    axes.tick_params(length=0)
    axes.grid(axis="y")


def modes_figure(cells: Sequence[Record]) -> Figure:
    """Stacked bars: share of the dense cost that each mode removed, per method; a row a model, a column a reduction."""
    models, reductions = unique(cells, "model"), unique(cells, "reduction")
    found = {mode for cell in cells for mode in cell["modes"]}
    modes = sorted(found, key=lambda mode: (mode.rsplit("_", 1)[1], mode))
    heights = [0.8 + 0.3 * len(unique([c for c in cells if c["model"] == m], "strategy")) for m in models]
    figure = Figure(figsize=(1.6 + 2.4 * len(reductions), sum(heights) + 0.6), layout="constrained")
    panels = figure.subplots(len(models), len(reductions), squeeze=False, sharex=True, height_ratios=heights)
    for row, model in zip(panels, models, strict=True):
        mine = [cell for cell in cells if cell["model"] == model]
        methods = unique(mine, "strategy")
        for column, (axes, reduction) in enumerate(zip(row, reductions, strict=True)):
            here = [cell for cell in mine if cell["reduction"] == reduction]
            _draw_modes(axes, here, methods, modes)
            axes.axvline(reduction, color=color("ink"), linewidth=0.8, linestyle=":")
            axes.set_title(f"{'' if column else model}\nreduction {percent(reduction)}", color=color("ink"))
            if column:
                axes.set_yticklabels([])
    for axes in panels[-1]:
        axes.set_xlabel("of the dense MACs")
    handles = [Patch(color=color(mode), label=mode) for mode in modes]
    _legend(figure, handles)
    return figure


def _draw_modes(axes: Axes, cells: Sequence[Record], methods: Sequence[str], modes: Sequence[str]) -> None:
    left = np.zeros(len(methods))
    for mode in modes:
        shares = np.array([
            fmean([cell["modes"].get(mode, 0.0) for cell in cells if cell["strategy"] == method] or [0.0])
            for method in methods
        ])  # fmt: skip
        axes.barh(range(len(methods)), shares, left=left, height=0.66, color=color(mode), linewidth=0)
        left += shares
    axes.set_yticks(range(len(methods)), methods)
    axes.set_ylim(len(methods) - 0.5, -0.5)
    axes.set_xlim(0, 1)
    axes.set_xticks([0, 0.5, 1])
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.tick_params(length=0)


def selection_figure(cells: Sequence[Record]) -> Figure:
    """Seconds of the selection over those of the training steps: bars are medians, dots are cells; one panel a model.

    What validation took besides is drawn paler behind the bar.
    """
    models = unique(cells, "model")
    most = max(len(unique([c for c in cells if c["model"] == m], "strategy")) for m in models)
    figure = Figure(figsize=(PANEL * len(models) + 0.4, 1.6 + 0.34 * most), layout="constrained")
    panels = figure.subplots(1, len(models), squeeze=False)[0]
    for axes, model in zip(panels, models, strict=True):
        mine = [cell for cell in cells if cell["model"] == model]
        _draw_selection(axes, mine, unique(mine, "strategy"))
        axes.set_title(model, color=color("ink"))
        axes.set_xlabel("seconds over training seconds")
    handles: list[Any] = [Patch(color=color("vision-params"), label="selection")]
    handles.append(Patch(color=color("vision-tokens"), alpha=0.5, label="validation"))
    _legend(figure, handles)
    return figure


def _draw_selection(axes: Axes, cells: Sequence[Record], methods: Sequence[str]) -> None:
    for row, method in enumerate(methods):
        mine = [cell for cell in cells if cell["strategy"] == method]
        selection, scoring = ratios(mine, "selection_seconds"), ratios(mine, "scoring_seconds")
        axes.barh(row, median(selection), height=0.6, color=color("vision-params"), linewidth=0)
        axes.barh(
            row,
            median(scoring),
            left=median(selection),
            height=0.6,
            color=color("vision-tokens"),
            alpha=0.5,
            linewidth=0,
        )
        axes.scatter(selection, [row] * len(selection), s=9, color=color("ink"), alpha=0.6, linewidths=0, zorder=3)
    axes.axvline(1, color=color("ink"), linewidth=0.8, linestyle=":")
    axes.set_yticks(range(len(methods)), methods)
    axes.set_ylim(len(methods) - 0.5, -0.5)
    axes.tick_params(length=0)
    axes.grid(axis="x")
