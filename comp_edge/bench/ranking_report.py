"""results.json, table.md and ranking.png of `comp-edge bench ranking`, from its finished parts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from comp_edge.bench.method.statistics import Spread, spread
from comp_edge.bench.method.table import PLUS_MINUS, markdown, percent
from comp_edge.bench.parts import TABLE_FILE, finished_parts, write_results
from comp_edge.bench.ranking_tokens import BASE, CIT, LIFTED, TOKENS
from comp_edge.bench.ranking_units import CHANNELS, GROUPS, HEADS, IMPORTANCES, MAGNITUDE, RANDOM
from comp_edge.files import write_bytes, write_text
from comp_edge.report import words
from comp_edge.report.theme import color, png, style

PICTURE_FILE = "ranking.png"
KINDS = (HEADS, GROUPS, CHANNELS, TOKENS, LIFTED)
NAMES = (*IMPORTANCES, BASE, CIT, MAGNITUDE, RANDOM)
AGREEMENT = "the other half"
# CIM's importances, and what they add to.
CORRECTED = (("wanda + CIP", "wanda"), (CIT, BASE))
PAINTS = {
    "wanda": ("#c2571a", "s"),
    "wanda + CIP": ("#7b5aa6", "D"),
    "taylor": ("#3f7fbf", "^"),
    "fisher": ("#1f6f5c", "o"),
    BASE: ("#c2571a", "s"),
    CIT: ("#7b5aa6", "D"),
    MAGNITUDE: ("#a8842c", "v"),
    RANDOM: ("#777777", "x"),
}
DPI = 160
Part = dict[str, Any]


def load_parts(out: Path) -> list[Part]:
    """The finished parts of a folder, by reduction and seed, without the single measurements."""
    parts = finished_parts(out)
    parts.sort(key=lambda part: (part["reduction"], part["seed"]))
    return [{name: value for name, value in part.items() if name != "units"} for part in parts]


def write_report(out: Path, *, command: str | None) -> dict[str, Any]:
    """Write the three files; returns what results.json holds.

    Args:
        command: as it was given; None: as it was written before.
    """
    parts = load_parts(out)
    results = write_results(out, parts, command=command)
    write_text(out / TABLE_FILE, table(parts, command=results["command"]))
    with style():
        write_bytes(out / PICTURE_FILE, png(figure(parts), dpi=DPI))
    return results


# ---- numbers


def values(parts: Sequence[Part], kind: str, name: str, which: str, reduction: float) -> dict[int, float]:
    """A correlation by seed; `name` may be AGREEMENT."""
    found = {}
    for part in parts:
        if part["reduction"] != reduction or kind not in part["rho"]:
            continue
        rho = part["rho"][kind]
        value = (rho["agreement"] if name == AGREEMENT else rho["importances"].get(name, {})).get(which)
        if value is not None:
            found[part["seed"]] = value
    return found


def over_seeds(found: dict[int, float]) -> Spread | None:
    """Mean and deviation; None of nothing."""
    return spread(list(found.values())) if found else None


def difference(parts: Sequence[Part], kind: str, pair: tuple[str, str], which: str, reduction: float) -> Spread | None:
    """Of the correlations of two importances, the first minus the second, seed by seed."""
    ours, theirs = (values(parts, kind, name, which, reduction) for name in pair)
    return over_seeds({seed: ours[seed] - theirs[seed] for seed in ours if seed in theirs})


def kinds_of(parts: Sequence[Part]) -> list[str]:
    """The kinds of removal that the parts have."""
    return [kind for kind in KINDS if any(kind in part["rho"] for part in parts)]


def names_of(parts: Sequence[Part], kind: str) -> list[str]:
    """The importances of a kind."""
    known = {name for part in parts for name in part["rho"].get(kind, {}).get("importances", ())}
    return [name for name in NAMES if name in known]


def reductions_of(parts: Sequence[Part]) -> list[float]:
    """The reductions that the parts have."""
    return sorted({part["reduction"] for part in parts})


# ---- the table


def table(parts: Sequence[Part], *, command: str | None) -> str:
    """The tables as Markdown."""
    first = parts[0]
    seeds = sorted({part["seed"] for part in parts})
    text = [f"# Ranking fidelity: {first['model']}"]
    if command:
        text.append(f"```\n{command}\n```")
    text.append(
        f"Spearman correlation of each importance with what the loss does when it is removed alone; mean {PLUS_MINUS} standard "
        f"deviation over {len(seeds)} seeds. First number: within a layer (tokens: within an image and layer), mean over "
        "layers. Second: over all layers at once. "
        f"`{AGREEMENT}`: the changes that one half of the evaluation set measures, with those of the other half."
    )
    text.append(_states(parts))
    for kind in kinds_of(parts):
        text += [f"## {kind}", _grid(parts, kind, ""), "With the size of the change:", _grid(parts, kind, "_size")]
    text += ["## What CIM adds", _corrections(parts)]
    return "\n\n".join(text) + "\n"


def _states(parts: Sequence[Part]) -> str:
    rows = []
    for reduction in reductions_of(parts):
        mine = [part for part in parts if part["reduction"] == reduction]
        counts = ", ".join(
            f"{kind} {np.mean([p['rho'][kind]['n'] for p in mine if kind in p['rho']]):.0f}" for kind in kinds_of(mine)
        )
        cells = (_spread(spread([part[name] for part in mine]), 4) for name in ("loss", "val_score", "cost"))
        rows.append([percent(reduction), *cells, counts])
    return markdown(["reduction", "training loss", "validation score", "cost", "removals"], rows)


def _grid(parts: Sequence[Part], kind: str, size: str) -> str:
    reductions = reductions_of(parts)
    rows = []
    for name in [*names_of(parts, kind), AGREEMENT]:
        cells = []
        for reduction in reductions:
            pair = (over_seeds(values(parts, kind, name, f"{w}{size}", reduction)) for w in ("within", "across"))
            cells.append(" / ".join(_spread(value, 2) for value in pair))
        rows.append([f"`{name}`", *cells])
    return markdown([kind, *map(percent, reductions)], rows)


def _corrections(parts: Sequence[Part]) -> str:
    reductions = reductions_of(parts)
    rows = []
    for pair in CORRECTED:
        for kind in kinds_of(parts):
            if pair[0] not in names_of(parts, kind):
                continue
            cells = []
            for reduction in reductions:
                found = (difference(parts, kind, pair, which, reduction) for which in ("within", "across"))
                cells.append(" / ".join(_spread(value, 3, signed=True) for value in found))
            rows.append([f"`{pair[0]}` minus `{pair[1]}`, {kind}", *cells])
    return markdown(["difference of rho, paired by seed", *map(percent, reductions)], rows)


def _spread(value: Spread | None, digits: int, *, signed: bool = False) -> str:
    if value is None:
        return words.DASH
    number = words.signed(f"{value.mean:{'+' if signed else ''}.{digits}f}")
    return number if value.n < 2 else f"{number} {PLUS_MINUS} {value.std:.{digits}f}"


# ---- the picture


def figure(parts: Sequence[Part]) -> Figure:
    """Rho over reduction for each importance: a column a kind of removal, within layers above, over all layers below."""
    kinds = kinds_of(parts)
    drawn = Figure(figsize=(2.5 * len(kinds) + 0.6, 6.0), layout="constrained")
    panels = drawn.subplots(2, len(kinds), squeeze=False, sharex=True, sharey=True)
    for row, which, label in zip(panels, ("within", "across"), ("within layers", "over all layers"), strict=True):
        for axes, kind in zip(row, kinds, strict=True):
            _draw(axes, parts, kind, which)
        row[0].set_ylabel(f"rho {label}")
    for axes, kind in zip(panels[0], kinds, strict=True):
        axes.set_title(kind, color=color("ink"))
    for axes in panels[1]:
        axes.set_xlabel("reduction of MACs")
    shown = [name for name in NAMES if any(name in names_of(parts, kind) for kind in kinds)]
    handles = [_line(name) for name in shown if name not in (BASE, CIT)]
    handles += [_line(name, f"{name} (tokens)") for name in shown if name in (BASE, CIT)]
    handles.append(Line2D([], [], color=color("ink"), linestyle=":", linewidth=1.2, label=AGREEMENT))
    drawn.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 5), frameon=False)
    return drawn


def _line(name: str, label: str | None = None) -> Line2D:
    paint, marker = PAINTS[name]
    return Line2D([], [], color=paint, marker=marker, markersize=4.5, linewidth=1.5, label=label or name)


def _draw(axes: Axes, parts: Sequence[Part], kind: str, which: str) -> None:
    reductions = reductions_of(parts)
    axes.axhline(0, color=color("line"), linewidth=1)
    for name in [*names_of(parts, kind), AGREEMENT]:
        found = [(r, over_seeds(values(parts, kind, name, which, r))) for r in reductions]
        found = [(reduction, value) for reduction, value in found if value is not None]
        if not found:
            continue
        at, heights = [r for r, _ in found], [value.mean for _, value in found]
        if name == AGREEMENT:
            axes.plot(at, heights, color=color("ink"), linestyle=":", linewidth=1.2)
            continue
        paint, marker = PAINTS[name]
        axes.errorbar(
            at, heights, yerr=[np.nan_to_num(value.std) for _, value in found], color=paint, marker=marker, markersize=4.5,
            linewidth=1.5, elinewidth=0.9, capsize=2,
        )  # fmt: skip
    axes.set_xticks(reductions, [percent(reduction) for reduction in reductions])
    axes.tick_params(length=0)
    axes.grid(axis="y")
