"""What lies in a run's folder: finished cells, and what is made of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from comp_edge.bench.method.statistics import in_order
from comp_edge.bench.method.table import table
from comp_edge.bench.parts import RESULTS_FILE, TABLE_FILE
from comp_edge.errors import InputError
from comp_edge.files import read_json, write_bytes, write_json, write_text

KEYS = (
    "model", "strategy", "reduction", "score", "dense_seed", "prune_seed", "steps", "samples", "selection_seconds",
    "training_seconds", "macs", "task", "dense_score", "scoring_seconds", "peak_memory_bytes", "modes", "stages", "options",
)  # fmt: skip
PLACE = ("model", "strategy", "reduction", "dense_seed", "prune_seed")


def load_cells(out: Path) -> list[dict[str, Any]]:
    """The finished cells of a folder, in order.

    Raises:
        InputError: a file among them is none.
    """
    cells = []
    for path in sorted((out / "cells").glob("*.json")):
        cell = read_json(path, what="cell")
        missing = [key for key in KEYS if not isinstance(cell, dict) or key not in cell]
        if missing:
            raise InputError(f"cell {str(path)!r} lacks {missing[0]!r}; delete it to have it run again.")
        cells.append(cell)
    return in_order(cells)


def write_results(
    out: Path, *, ours: str, command: str | None = None, failures: Sequence[dict[str, Any]] | None = None
) -> dict[str, Any]:
    """Write results.json and table.md from the finished cells.

    Args:
        command: of the run, a line beside those of the runs before that filled the folder.
        failures: what this run has learnt of cells that give no result, beside what those before have; a cell that is
            finished by now has one.

    Returns:
        what results.json holds.
    """
    cells = load_cells(out)
    known = {} if not (out / RESULTS_FILE).is_file() else read_json(out / RESULTS_FILE, what="results")
    before = (known.get("command") or "").splitlines()
    command = "\n".join(dict.fromkeys([*before, *filter(None, [command])])) or None
    by_place = {tuple(f[name] for name in PLACE): f for f in (*known.get("failures", []), *(failures or []))}
    done = {tuple(cell[name] for name in PLACE) for cell in cells}
    results: dict[str, Any] = {
        "command": command,
        "cells": [{key: value for key, value in cell.items() if key != "trace"} for cell in cells],
        "failures": in_order(f for place, f in by_place.items() if place not in done),
    }
    write_json(out / RESULTS_FILE, results)
    write_text(out / TABLE_FILE, table(cells, failures=results["failures"], ours=ours, command=command))
    return results


def write_pictures(out: Path, *, ours: str) -> list[Path]:
    """Draw the pictures from the finished cells; returns their files."""
    from comp_edge.bench.method.pictures import pictures  # brings matplotlib

    written = []
    for name, content in pictures(load_cells(out), ours=ours).items():
        write_bytes(out / name, content)
        written.append(out / name)
    return written
