"""Pictures of what predictions are worth, from plain data: milliseconds against milliseconds, and scores against them.

`comp_edge.report.times` draws where the time goes.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from comp_edge.report import words
from comp_edge.report.theme import PHONE_WIDTH, color, png, style

DPI = 160
HIGH = 4.7  # inches: with their labels, axes are about as wide as they are high
BAND = 0.1  # of what was measured
WIDE = 10.0  # from this ratio of the largest to the smallest on, axes are logarithmic
# How a benchmark's passes were steered: label, colour, marker. Ours is drawn last and thick.
DRIVERS = {
    "macs": ("driven by MACs", "language_params", "s"),
    "latency": ("driven by predicted latency", "vision_params", "o"),
}

Row = Mapping[str, Any]


# ---- predictions


def predicted_against_measured(rows: Sequence[Row], *, paint: str = "vision_params") -> Figure:
    """Predicted over measured milliseconds; to draw within `theme.style`.

    Args:
        rows: `measured_ms` and `predicted_ms`; where known `uncertainty_ms` of the prediction and `noise_ms` of the
            measurement, which are drawn as error bars, and `proportional_ms`, predicted from MACs alone.
        paint: a name of the palette.
    """
    figure = Figure(figsize=(PHONE_WIDTH, HIGH), layout="constrained")
    draw_predictions(figure.subplots(), rows, paint=paint)
    return figure


def latency_png(results: Mapping[str, Any]) -> bytes:
    """The picture of `comp-edge bench latency`: plans that no profile has measured, one panel a model.

    Args:
        results: what `devices.bench.summarize` returns.
    """
    models = results["models"]
    with style():
        figure = Figure(figsize=(PHONE_WIDTH * len(models), HIGH + 0.2), layout="constrained")
        panels = figure.subplots(1, len(models), squeeze=False)[0]
        for axes, (name, found) in zip(panels, models.items(), strict=True):
            draw_predictions(axes, found["plans"])
            axes.set_title(name, color=color("ink"))
        return png(figure, dpi=DPI)


def draw_predictions(axes: Axes, rows: Sequence[Row], *, paint: str = "vision_params") -> None:
    """See `predicted_against_measured`."""
    measured, predicted = _column(rows, "measured_ms"), _column(rows, "predicted_ms")
    plain = [row for row in rows if "proportional_ms" in row]
    proportional = _column(plain, "proportional_ms")
    low, high = _limits([*measured, *predicted, *proportional])
    for axis, scale in ((axes.xaxis, axes.set_xscale), (axes.yaxis, axes.set_yscale)):
        if low > 0 and high / low > WIDE:
            _logarithmic(axis, scale)
        else:
            axis.set_major_locator(MaxNLocator(6))
    # Drawn as many points: a band of two corners is straight on linear axes only.
    line = [low + (high - low) * step / 100 for step in range(101)]
    axes.fill_between(
        line, [(1 - BAND) * ms for ms in line], [(1 + BAND) * ms for ms in line], color=color("dense"), alpha=0.25,
        linewidth=0, label=f"within {words.percent(BAND, 0)}",
    )  # fmt: skip
    axes.plot(line, line, color=color("muted"), linewidth=1, dashes=(4, 3), zorder=2)
    if plain:
        axes.scatter(
            _column(plain, "measured_ms"), proportional, s=22, marker="x", linewidths=1.1, color=color("other"),
            alpha=0.75, zorder=3, label=f"in proportion to MACs, off by {_off(plain, 'proportional_ms')}",
        )  # fmt: skip
    axes.errorbar(
        measured, predicted, yerr=_bars(rows, "uncertainty_ms"), xerr=_bars(rows, "noise_ms"), fmt="o", markersize=5,
        color=color(paint), markeredgecolor=color("paper"), markeredgewidth=0.6, ecolor=color(paint), elinewidth=1,
        zorder=4, label=f"predicted, off by {_off(rows, 'predicted_ms')}",
    )  # fmt: skip
    axes.set_xlim(low, high)
    axes.set_ylim(low, high)
    axes.set_xlabel("measured ms")
    axes.set_ylabel("predicted ms")
    axes.tick_params(length=0)
    axes.grid()
    axes.legend(loc="upper left", frameon=False, fontsize="small", handletextpad=0.5, borderaxespad=0.2)


def _logarithmic(axis: Axis, scale: Callable[[str], None]) -> None:
    scale("log")
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(NullLocator())


def _limits(values: Sequence[float]) -> tuple[float, float]:
    """A little more than the range, by a factor, so that it suits both kinds of axes."""
    low, high = min(values, default=1.0), max(values, default=1.0)
    return low / 1.15, high * 1.15 or 1.0


def _off(rows: Sequence[Row], name: str) -> str:
    """The mean relative error."""
    errors = [abs(row[name] / row["measured_ms"] - 1) for row in rows if row["measured_ms"] > 0]
    return words.percent(statistics.fmean(errors)) if errors else words.DASH


def _column(rows: Iterable[Row], name: str) -> list[float]:
    return [row[name] for row in rows]


def _bars(rows: Sequence[Row], name: str) -> list[float] | None:
    return _column(rows, name) if all(name in row for row in rows) else None


# ---- what predictions are worth


class Steered(NamedTuple):
    """Passes to one budget that were steered alike: means and standard deviations over seeds (0 for one seed)."""

    budget_ms: float
    ms: float
    ms_std: float
    score: float
    score_std: float
    count: int


def by_driver(rows: Iterable[Row]) -> dict[str, list[Steered]]:
    """What each way to steer reached, by budget from the tightest on; passes that were not measured are left out.

    Args:
        rows: `seed`, `driven_by` ("macs" or "latency"), `measured_ms`, `score`, `budget_ms`.
    """
    groups: dict[tuple[str, float], list[Row]] = {}
    for row in rows:
        if row["measured_ms"] is not None:
            groups.setdefault((row["driven_by"], row["budget_ms"]), []).append(row)
    found: dict[str, list[Steered]] = {driver: [] for driver in DRIVERS}
    for (driver, budget), mine in sorted(groups.items()):
        ms, scores = _column(mine, "measured_ms"), _column(mine, "score")
        found[driver].append(
            Steered(budget, statistics.fmean(ms), _std(ms), statistics.fmean(scores), _std(scores), len(mine))
        )
    return found


def steered(rows: Sequence[Row]) -> Figure:
    """Score over measured milliseconds, a line for each way to steer; dots are passes; to draw within `theme.style`.

    Args:
        rows: see `by_driver`.
    """
    figure = Figure(figsize=(1.4 * PHONE_WIDTH, 0.9 * PHONE_WIDTH), layout="constrained")
    axes, groups = figure.subplots(), by_driver(rows)
    for budget in sorted({group.budget_ms for mine in groups.values() for group in mine}):
        axes.axvline(budget, color=color("muted"), linewidth=0.8, linestyle=":", zorder=1)
        axes.annotate(
            f"budget {words.milliseconds(budget)}", (budget, 1), xycoords=("data", "axes fraction"), xytext=(0, 3),
            textcoords="offset points", ha="center", color=color("muted"), fontsize="small",
        )  # fmt: skip
    for driver, (label, paint, marker) in DRIVERS.items():
        mine, ours = groups[driver], driver == "latency"
        if not mine:
            continue
        passes = [row for row in rows if row["driven_by"] == driver and row["measured_ms"] is not None]
        axes.scatter(
            _column(passes, "measured_ms"), _column(passes, "score"), s=12, marker=marker, color=color(paint),
            alpha=0.35, linewidths=0, zorder=2,
        )  # fmt: skip
        axes.errorbar(
            [one.ms for one in mine], [one.score for one in mine], xerr=[one.ms_std for one in mine],
            yerr=[one.score_std for one in mine], color=color(paint), marker=marker, markersize=6,
            linewidth=2.4 if ours else 1.4, elinewidth=1, capsize=2, zorder=4 if ours else 3, label=label,
        )  # fmt: skip
    axes.margins(x=0.1, y=0.16)
    axes.xaxis.set_major_locator(MaxNLocator(8))
    axes.set_xlabel("measured ms of a request")
    axes.set_ylabel("test score")
    axes.tick_params(length=0)
    axes.grid(axis="y")
    figure.legend(loc="outside lower center", ncols=len(DRIVERS), frameon=False)
    return figure


def steered_png(rows: Sequence[Row]) -> bytes:
    """The picture of `comp-edge bench budget`, see `steered`."""
    with style():
        return png(steered(rows), dpi=DPI)


def _std(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0
