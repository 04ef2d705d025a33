"""results.json and table.md of `comp-edge bench thresholds`, from its finished parts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from comp_edge.bench.method.statistics import paired_difference, spread
from comp_edge.bench.method.table import PLUS_MINUS, markdown, percent, spread_text
from comp_edge.bench.parts import TABLE_FILE, finished_parts, write_results
from comp_edge.bench.thresholds_run import ARMS, DYNAMIC, SCHEDULE, STATIC
from comp_edge.files import write_text
from comp_edge.report import words

Part = dict[str, Any]


def write_report(out: Path, *, command: str | None) -> dict[str, Any]:
    """Write both files; returns what results.json holds.

    Args:
        command: as it was given; None: as it was written before.

    Raises:
        InputError: nothing is finished.
    """
    parts = finished_parts(out, counts=lambda part: part["arm"] in ARMS)
    parts.sort(key=lambda part: (part["reduction"], part["seed"], (SCHEDULE, *ARMS).index(part["arm"])))
    results = write_results(out, parts, command=command)
    write_text(out / TABLE_FILE, table(parts, command=results["command"]))
    return results


def table(parts: Sequence[Part], *, command: str | None) -> str:
    """The tables as Markdown."""
    first = next(part for part in parts if part["arm"] in ARMS)
    text = [f"# Static schedule and per-image thresholds: {first['model']}"]
    if command:
        text.append(f"```\n{command}\n```")
    text.append(
        f"Test score of the dense model {_dense_scores(parts)}. Both sides begin "
        f"with it and take {first['steps']} optimizer steps on the same batches. Mean {PLUS_MINUS} standard deviation (number "
        "of seeds); MACs of the thresholds are the mean over the images of the test split, as a share of the static schedule's."
    )
    reductions = sorted({part["reduction"] for part in parts})
    text.append(_scores(parts, reductions))
    for reduction in reductions:
        if mine := [part for part in parts if part["reduction"] == reduction and part["arm"] in ARMS]:
            text += [f"## Tokens of the vision layers at {percent(reduction)}", _counts(mine)]
    return "\n\n".join(text) + "\n"


def _dense_scores(parts: Sequence[Part]) -> str:
    """One score where all seeds begin with the same weights, otherwise one a seed."""
    mine = [part for part in parts if part["arm"] == SCHEDULE]
    if len({part["options"].get("dense_weights") for part in mine}) == 1:
        return f"{mine[0]['dense_score']:.4f}, the same for all seeds"
    return ", ".join(
        f"{score:.4f} (seed {seed})" for seed, score in sorted({p["seed"]: p["dense_score"] for p in mine}.items())
    )


def _scores(parts: Sequence[Part], reductions: Sequence[float]) -> str:
    rows = []
    for reduction in reductions:
        score: dict[str, dict[int, float]] = {arm: {} for arm in ARMS}
        macs: list[float] = []
        for part in parts:
            if part["reduction"] == reduction and part["arm"] in ARMS:
                score[part["arm"]][part["seed"]] = part["score"]
                if part["arm"] == DYNAMIC:
                    macs.append(part["macs"] / part["static_macs"])
        cells = [spread_text(spread(list(score[arm].values()))) if score[arm] else words.DASH for arm in ARMS]
        found = paired_difference(score[DYNAMIC], score[STATIC])
        if found is None:
            cells += [words.DASH, words.DASH]
        else:
            error = words.DASH if found.n < 2 else f"{found.error:.4f}"
            cells += [words.signed(f"{found.mean:+.4f}"), error]
        rows.append([percent(reduction), *cells, spread_text(spread(macs)) if macs else words.DASH])
    head = ["reduction", STATIC, DYNAMIC, "dynamic minus static", "standard error", "MACs of dynamic / static"]
    return markdown(head, rows)


def _counts(parts: Sequence[Part]) -> str:
    layers = range(len(parts[0]["counts"]))
    rows = []
    for part in parts:
        cells = [
            f"{mean:.1f}" + (f" {PLUS_MINUS} {std:.1f}" if part["arm"] == DYNAMIC else "")
            for mean, std in zip(part["counts"], part["deviations"], strict=True)
        ]
        rows.append([f"{part['arm']}, seed {part['seed']}", *cells])
    return markdown([f"mean {PLUS_MINUS} deviation over images", *(f"layer {i}" for i in layers)], rows)
