"""table.md: scores, paired differences, what the selection cost, and what gave no result."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, median
from typing import Any

from comp_edge.bench.method.statistics import Difference, Record, Spread, differences, summary, unique
from comp_edge.report import words

PLUS_MINUS = "\u00b1"


def table(cells: Sequence[Record], *, failures: Sequence[Record], ours: str, command: str | None) -> str:
    """The tables as Markdown."""
    parts = ["# comp-edge bench method"]
    if command:
        parts.append(f"```\n{command}\n```")
    for model in unique(cells, "model"):
        mine = [cell for cell in cells if cell["model"] == model]
        parts += [f"## {model}", _facts(mine), _scores(mine), *_paired(mine, ours), _costs(mine)]
    if failures:
        parts += ["## Without a result", _failures(failures)]
    return "\n\n".join(parts) + "\n"


def percent(reduction: float) -> str:
    """A reduction, with as many digits as it needs."""
    return words.percent(reduction, 0 if round(100 * reduction, 6).is_integer() else 1)


def spread_text(value: Spread) -> str:
    """0.963 ± 0.012 (3)."""
    std = words.DASH if math.isnan(value.std) else f"{value.std:.3f}"
    return f"{words.score(value.mean)} {PLUS_MINUS} {std} ({value.n})"


def _facts(cells: Sequence[Record]) -> str:
    dense = {cell["dense_seed"]: cell["dense_score"] for cell in cells}
    scores = ", ".join(f"{score:.4f} (seed {seed})" for seed, score in sorted(dense.items()))
    tasks, steps, samples = (
        ", ".join(f"{v:,}" if isinstance(v, int) else v for v in unique(cells, name))
        for name in ("task", "steps", "samples")
    )
    return (
        f"Task {tasks}; test score of the dense model {scores}. Every cell: {steps} optimizer steps, {samples} samples, those "
        "of the final fine-tuning included."
    )


def _scores(cells: Sequence[Record]) -> str:
    reductions, rows = unique(cells, "reduction"), summary(cells)
    lines = []
    for method in unique(cells, "strategy"):
        found = [rows.get((cells[0]["model"], method, reduction)) for reduction in reductions]
        lines.append([_code(method), *(words.DASH if value is None else spread_text(value) for value in found)])
    head = ["test score at reduction", *(percent(reduction) for reduction in reductions)]
    note = f"Mean {PLUS_MINUS} standard deviation (number of seeds)."
    return f"{markdown(head, lines)}\n\n{note}"


def _paired(cells: Sequence[Record], ours: str) -> list[str]:
    rows = differences(cells, ours=ours)
    if not rows:
        return []
    lines = [
        [percent(reduction), _code(other), *_difference(value)]
        for (_, other, reduction), value in sorted(rows.items(), key=lambda row: row[0][2])
    ]
    head = ["reduction", f"{_code(ours)} minus", "mean difference", "standard error", "in errors", "pairs"]
    note = "Pairs share model, dense seed, pruning seed and reduction."
    return [f"{markdown(head, lines, left=2)}\n\n{note}"]


def _difference(value: Difference) -> list[str]:
    error, errors = (
        words.DASH if math.isnan(number) else words.signed(text.format(number))
        for number, text in ((value.error, "{:.4f}"), (value.errors, "{:+.1f}"))
    )
    return [words.signed(f"{value.mean:+.4f}"), error, errors, str(value.n)]


def _costs(cells: Sequence[Record]) -> str:
    lines = []
    for method in unique(cells, "strategy"):
        mine = [cell for cell in cells if cell["strategy"] == method]
        selection, scoring = (median(ratios(mine, name)) for name in ("selection_seconds", "scoring_seconds"))
        lines.append([
            _code(method), *(f"{median(cell[f'{name}_seconds'] for cell in mine):.1f} s" for name in
                             ("training", "selection", "scoring")),
            f"{selection:.2f}", f"{scoring:.2f}", f"{fmean(cell['stages'] for cell in mine):.1f}",
            words.amount(max(cell["peak_memory_bytes"] for cell in mine), "B"),
        ])  # fmt: skip
    head = [
        "cost of a cell", "training", "selection", "scoring", "selection / training", "scoring / training", "stages",
        "peak memory",
    ]  # fmt: skip
    note = "Medians over cells, for a cell that shared its core says little; stages are a mean, peak memory is the largest."
    return f"{markdown(head, lines)}\n\n{note}"


def ratios(cells: Sequence[Record], name: str) -> list[float]:
    """Seconds under a name over those of the training steps, of each cell."""
    return [cell[name] / max(cell["training_seconds"], 1e-9) for cell in cells]


def _failures(failures: Sequence[Record]) -> str:
    head = ["model", "strategy", "reduction", "seeds", "", "reason"]
    lines = [
        [f["model"], _code(f["strategy"]), percent(f["reduction"]), f"{f['dense_seed']}/{f['prune_seed']}",
         f["kind"], f["reason"].replace("|", "\\|")]
        for f in failures
    ]  # fmt: skip
    return markdown(head, lines, left=len(head))


def markdown(head: Sequence[str], rows: Sequence[Sequence[Any]], *, left: int = 1) -> str:
    """A Markdown table; the first columns are text, the others numbers."""
    lines = [head, ["---"] * left + ["---:"] * (len(head) - left), *rows]
    return "\n".join("| " + " | ".join(row) + " |" for row in lines)


def _code(label: str) -> str:
    return f"`{label}`"
