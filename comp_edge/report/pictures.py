"""The report's charts, as matplotlib figures and as functions that draw into given axes."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from comp_edge.plan import Plan
from comp_edge.report import words
from comp_edge.report.facts import Facts
from comp_edge.report.theme import PHONE_WIDTH, color

MANY_HEADS = 16  # above this, heads are drawn as a bar instead of one square each


def score_figure(facts: Facts) -> Figure:
    """Validation score over stages; to draw within `theme.style`."""
    figure = Figure(figsize=(PHONE_WIDTH, 2.9), layout="constrained")
    draw_scores(figure.subplots(), facts)
    return figure


def macs_figure(facts: Facts) -> Figure:
    """Multiply-accumulates over stages."""
    figure = Figure(figsize=(PHONE_WIDTH, 2.9), layout="constrained")
    draw_macs(figure.subplots(), facts)
    return figure


def draw_scores(axes: Axes, facts: Facts) -> None:
    """The score after each stage, in the colour of its mode; the dense model as a line, the fine-tuned one as a diamond."""
    dense, final = facts.metrics.dense.val_score, facts.metrics.pruned.val_score
    stages, end = [s.stage for s in facts.trace], facts.trace[-1].stage + 1
    values = [s.score for s in facts.trace]
    axes.axhline(dense, color=color("dense"), linewidth=1.2, dashes=(4, 3), zorder=1)
    axes.plot([0, *stages, end], [dense, *values, final], color=color("muted"), linewidth=1, zorder=2)
    axes.scatter(stages, values, s=26, c=[color(s.mode) for s in facts.trace], zorder=3)
    axes.scatter([end], [final], s=44, marker="D", color=color("ink"), zorder=4)
    # A flat run near the top should not look like a cliff.
    low, high = min(*values, dense, final), max(*values, dense, final)
    room = max(high - low, 0.02)
    axes.set_ylim(low - 0.12 * room, high + 0.28 * room)
    _note(axes, f"dense {words.score(dense)}", (0, dense), offset=(0, 5), align="left", ink="muted")
    above = final < high - 0.12 * room
    _note(axes, words.score(final), (end, final), offset=(0, 8 if above else -16), align="right", ink="ink")
    _stage_axis(axes, end, "validation score")


def draw_macs(axes: Axes, facts: Facts) -> None:
    """MACs as a share of the dense model's after each stage, and the predicted cost where that is something else."""
    whole = facts.metrics.dense.macs
    stages, end = [0, *(s.stage for s in facts.trace)], facts.trace[-1].stage + 1
    shares = [1.0, *(s.macs / whole for s in facts.trace)]
    axes.fill_between(stages, shares, step="post", color=color("dense"), alpha=0.25, linewidth=0)
    axes.step(stages, shares, where="post", color=color("muted"), linewidth=1)
    axes.scatter(stages[1:], shares[1:], s=26, c=[color(s.mode) for s in facts.trace], zorder=3)
    cost = facts.plan.cost
    if cost is not None and cost.name != "macs":
        axes.step(
            stages, [1.0, *(s.cost_fraction for s in facts.trace)], where="post", color=color("ink"),
            linewidth=1, linestyle=":",
        )  # fmt: skip
        last = facts.trace[-1].predicted_ms
        reached = "" if last is None else f", {words.milliseconds(last)} at the end"
        _note(axes, f"dotted: {cost.name}{reached}", (0, 0), offset=(4, 5), align="left", ink="ink")
    _note(axes, words.percent(shares[-1]), (stages[-1], shares[-1]), offset=(0, 8), align="center", ink="ink")
    axes.set_ylim(0, 1.08)
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.grid(axis="y")
    _stage_axis(axes, end, "MACs, share of the dense model")


def stream_figure(facts: Facts, name: str) -> Figure:
    """Per layer of a stream: heads, feed-forward channels and tokens that are left, over those of the dense model."""
    layers = len(facts.plan.streams[name].layers)
    figure = Figure(figsize=(PHONE_WIDTH, 0.75 + 0.27 * layers), layout="constrained")
    heads, ffn, tokens = figure.subplots(1, 3, sharey=True, width_ratios=(3, 4, 4))
    draw_heads(heads, facts.dense, facts.plan, name)
    before, after = facts.dense.streams[name], facts.plan.streams[name]
    deep, light = color(f"{name}_params"), color(f"{name}_tokens")
    bars(ffn, [len(v.ffn) for v in before.layers], [len(v.ffn) for v in after.layers], paint=deep)
    bars(tokens, before.tokens, after.tokens, paint=light)
    for axes, title in ((heads, "heads"), (ffn, "FFN channels"), (tokens, "tokens")):
        axes.set_title(title, color=color("ink"))
    heads.set_ylabel("layer")
    heads.set_ylim(layers - 0.4, -0.6)
    heads.set_yticks(range(layers))
    return figure


def draw_heads(axes: Axes, dense: Plan, plan: Plan, name: str) -> None:
    """A square for each head, hollow where it was removed; a bar where there are too many to draw."""
    before, after = dense.streams[name].layers, plan.streams[name].layers
    most = max(len(layer.heads) for layer in before)
    if most > MANY_HEADS:
        bars(axes, [len(v.heads) for v in before], [len(v.heads) for v in after], paint=color(f"{name}_params"))
        return
    squares = [(x, y, x in after[y].heads) for y, layer in enumerate(before) for x in layer.heads]
    size = min(52.0, 2600 / most**2)
    for wanted, face in ((True, color(f"{name}_params")), (False, "none")):
        chosen = [(x, y) for x, y, kept in squares if kept is wanted]
        edge = color(f"{name}_params" if wanted else "dense")
        axes.scatter(
            [x for x, _ in chosen], [y for _, y in chosen], s=size, marker="s", facecolors=face, edgecolors=edge,
            linewidths=0.9,
        )  # fmt: skip
    axes.set_xlim(-0.6, most - 0.4)
    _bare(axes)


def bars(axes: Axes, before: Sequence[int], after: Sequence[int], *, paint: str) -> None:
    """Two bars a layer, one over the other: what was there (pale) and what is left, with its number."""
    rows, widest = range(len(before)), max(*before, 1)
    axes.barh(rows, before, height=0.62, color=color("dense"), alpha=0.32, linewidth=0)
    axes.barh(rows, after, height=0.62, color=paint, linewidth=0)
    for row, value in zip(rows, after, strict=True):
        axes.annotate(
            f"{value}" if value else "none", (widest, row), xytext=(4, 0), textcoords="offset points", va="center",
            color=color("muted"), fontsize="small", annotation_clip=False,
        )  # fmt: skip
    axes.set_xlim(0, widest * 1.3)
    _bare(axes)


def draw_tokens(axes: Axes, facts: Facts) -> None:
    """Tokens of every layer of all streams in the order in which a request runs through them, before and after."""
    start, ticks = 0, []
    for name, stream in facts.plan.streams.items():
        before = facts.dense.streams[name].tokens
        rows = range(start, start + len(before))
        axes.bar(rows, before, width=0.72, color=color("dense"), alpha=0.32, linewidth=0)
        axes.bar(rows, stream.tokens, width=0.72, color=color(f"{name}_tokens"), linewidth=0)
        for x, value in zip(rows, stream.tokens, strict=True):
            axes.annotate(
                str(value), (x, value), xytext=(0, 2), textcoords="offset points", ha="center", fontsize="small"
            )
        ticks += [(x, str(x - start)) for x in rows]
        axes.annotate(
            name, ((rows[0] + rows[-1]) / 2, 0), xytext=(0, -26), textcoords="offset points", ha="center",
            color=color(f"{name}_params"), annotation_clip=False,
        )  # fmt: skip
        start = rows[-1] + 2
    axes.set_xticks([x for x, _ in ticks], [text for _, text in ticks])
    axes.tick_params(length=0)
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)


def _stage_axis(axes: Axes, end: int, title: str) -> None:
    axes.set_title(title, color=color("ink"))
    axes.set_xlim(-0.4, end + 0.5)
    axes.set_xlabel("stage")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.tick_params(length=0)


def _note(axes: Axes, text: str, at: tuple[float, float], *, offset: tuple[float, float], align: str, ink: str) -> None:
    axes.annotate(
        text, at, xytext=offset, textcoords="offset points", ha=align, color=color(ink), fontsize="small",
        annotation_clip=False,
    )  # fmt: skip


def _bare(axes: Axes) -> None:
    axes.tick_params(length=0)
    axes.set_xticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)
