"""Putting the page together: facts, charts and examples into one self-contained HTML file."""

from __future__ import annotations

import math
import shlex
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup
from matplotlib.figure import Figure

from comp_edge.checkpoint import load_processor
from comp_edge.files import write_text
from comp_edge.plan import Plan
from comp_edge.report import latency, pictures, templates, theme, tokens, verification, words
from comp_edge.report.facts import Facts, Stage, read_facts
from comp_edge.tasks import load_task
from comp_edge.tasks.vqa import VQATask

REPORT_FILE = "report.html"
EXAMPLES = 8
SMALL_IMAGE = 160  # pixels; smaller ones are enlarged without smoothing
PARTS = ("vision", "cross", "connector", "language", "head")
WHY = {
    "cheapest": "the lowest price of all candidates",
    "explored": "drawn at random, favouring modes that have not run for long",
    "scouted": "tokens and parameters in the proportion that short trials to the budget's end found best",
    "first try": "every mode is tried once at the start",
}


def write_report(
    folder: str | Path,
    *,
    task: str | None = None,
    verification: Mapping[str, Any] | None = None,
    out: str | Path | None = None,
) -> Path:
    """Write the report of a pruned model folder: one HTML page that needs nothing else.

    Args:
        task: draws what the model keeps of validation images of this task, where it is about images and questions.
        verification: what `comp-edge demo --json` prints.
        out: the file to write; `report.html` in the folder by default.

    Returns:
        The file.

    Raises:
        InputError: no pruned model folder, malformed plan, trace, metrics or verification, unknown task, or a file that
            cannot be written.
    """
    facts = read_facts(folder)
    # Refuse what is malformed before the model runs.
    given = {} if verification is None else verification
    context = headline(facts, given, task=task) | {"checks": _checks(given)}
    context["examples"] = None if task is None else _examples(facts, task)
    context |= _charts(facts) | _stages(facts) | {"parts": _parts(facts), "device": _device(facts)}
    path = Path(out) if out is not None else facts.folder / REPORT_FILE
    write_text(path, render(context))
    return path


def render(context: Mapping[str, Any]) -> str:
    """The page for a complete context."""
    return templates.render("report.html.j2", {"why": WHY} | dict(context))


# ---- headline


@dataclass(frozen=True)
class Row:
    """One line of the headline table; `share` (pruned over dense) draws a bar, None draws none."""

    name: str
    dense: str
    pruned: str
    change: str
    share: float | None = None


def headline(facts: Facts, given: Mapping[str, Any], *, task: str | None) -> dict[str, Any]:
    """Dense against pruned, in numbers."""
    dense, pruned = facts.metrics.dense, facts.metrics.pruned
    verified = verification.latency(given)
    rows = []
    for name, a, b in (
        ("Score, test split", dense.test_score, pruned.test_score),
        ("Score, validation", dense.val_score, pruned.val_score),
    ):
        if b is not None:
            known = a is not None
            rows.append(
                Row(name, words.score(a) if known else words.DASH, words.score(b), words.change(a, b) if known else "")
            )
    rows.append(_saved("Multiply-accumulates", dense.macs, pruned.macs, words.amount))
    rows.append(_saved("Parameters", *facts.parameters, words.amount))
    rows.append(_saved("Weights on disk", *facts.weights_bytes, lambda v: words.amount(v, "B"), word="smaller"))
    if facts.metrics.device is not None:
        ms = facts.metrics.device.predicted_ms
        rows.append(_saved("Latency of a request", ms.dense, ms.pruned, words.milliseconds, word="faster"))
    if verified is not None:
        rows.append(
            _saved(
                "Latency to the first token", verified.dense, verified.pruned, lambda v: f"{v:.2f} ms", word="faster"
            )
        )
    return {
        "title": facts.title,
        "kept": words.percent(pruned.macs / dense.macs),
        "rows": rows,
        "latency": verified,
        "command": command(facts.plan, task),
        "strategy": facts.plan.strategy,
        "seed": facts.plan.seed,
        "budget": budget_text(facts.plan, None if facts.metrics.device is None else facts.metrics.device.device.name),
        "stage_count": len(facts.trace),
        "steps": facts.metrics.steps,
        "minutes": sum(facts.metrics.seconds.values()) / 60,
    }


def _saved(name: str, dense: float, pruned: float, write: Callable[[float], str], *, word: str = "fewer") -> Row:
    return Row(name, write(dense), write(pruned), words.fewer(dense, pruned, word), min(pruned / dense, 1.0))


def budget_text(plan: Plan, device: str | None = None) -> str:
    """The budget in words; `device` is what milliseconds are of."""
    budget, parts = plan.budget, []
    if device is not None and "speedup" in budget:
        return f"{budget['speedup']}{words.TIMES} faster on {device}"
    if device is not None and "latency_ms" in budget:
        return f"{budget['latency_ms']} ms on {device}"
    if "macs" in budget:
        parts.append(f"keep {budget['macs']} of the MACs")
    if "latency_ms" in budget:
        parts.append(f"{budget['latency_ms']} ms predicted by {plan.cost.name if plan.cost else 'the cost model'}")
    if "speedup" in budget:
        parts.append(f"{budget['speedup']}{words.TIMES} less {plan.cost.name if plan.cost else 'cost'}")
    if budget.get("decode_tokens"):
        parts.append(f"counting {budget['decode_tokens']} generated tokens")
    return ", ".join(parts) or "not recorded"


def command(plan: Plan, task: str | None) -> str | None:
    """The command line that the plan records, as far as it does; None for budgets that only Python can give."""
    if "macs" not in plan.budget or not plan.base:
        return None
    arguments = ["comp-edge", "prune", "--model", plan.base, "--task", task or "TASK"]
    arguments += ["--keep", str(plan.budget["macs"]), "--strategy", plan.strategy, "--seed", str(plan.seed)]
    if plan.budget.get("decode_tokens"):
        arguments += ["--decode-tokens", str(plan.budget["decode_tokens"])]
    return shlex.join([*arguments, "-o", "pruned"])


# ---- charts and stages


def _charts(facts: Facts) -> dict[str, Any]:
    def chart(make: Callable[[], Figure], label: str) -> Markup:
        return theme.svg(make(), label=label)

    with theme.style():
        return {
            "score_chart": chart(lambda: pictures.score_figure(facts), "Validation score after each stage"),
            "macs_chart": chart(lambda: pictures.macs_figure(facts), "Multiply-accumulates after each stage"),
            "layer_charts": [
                (name, chart(lambda name=name: pictures.stream_figure(facts, name), f"Widths and tokens of {name}"))
                for name in facts.plan.streams
            ],
            "dropped": {name: _first_drop(stream.tokens) for name, stream in facts.plan.streams.items()},
            "starts": {name: _shorter_start(facts, name) for name in facts.plan.streams},
        }  # fmt: skip


def _first_drop(counts: tuple[int, ...]) -> int | None:
    return next((i + 1 for i, (a, b) in enumerate(zip(counts, counts[1:], strict=False)) if b < a), None)


def _shorter_start(facts: Facts, name: str) -> tuple[int, int] | None:
    before, after = facts.dense.streams[name].tokens[0], facts.plan.streams[name].tokens[0]
    return (before, after) if after < before else None


def _stages(facts: Facts) -> dict[str, Any]:
    scale = price_scale(facts.trace)
    lanes = {mode: i for i, mode in enumerate(facts.modes)}
    rows = []
    for stage in facts.trace:
        dots = [
            {
                "name": name, "price": words.price(value), "mode": name, "taken": name == stage.mode,
                "lane": lanes[name], "x": place(value, scale), "finite": math.isfinite(value),
            }
            for name, value in sorted(stage.costs.items(), key=lambda item: (math.isnan(item[1]), item[1]))
        ]  # fmt: skip
        rows.append(
            {
                "stage": stage.stage, "mode": stage.mode,
                "why": stage.why, "also": ", ".join(stage.also), "dots": dots, "saved": words.percent(stage.saved),
                "cost": words.percent(stage.cost_fraction), "score": words.score(stage.score),
                "loss": "" if stage.loss is None else f"{stage.loss:.3f}", "seconds": f"{stage.seconds:.1f} s",
                "predicted": "" if stage.predicted_ms is None else words.milliseconds(stage.predicted_ms),
            }
        )  # fmt: skip
    return {
        "stages": rows, "priced": any(stage.costs for stage in facts.trace), "ways": _ways(facts.trace),
        "modes": facts.modes, "zero": place(0.0, scale), "reasons": {s.why for s in facts.trace},
        "shares": {mode: _share(facts.trace, mode) for mode in facts.modes},
        "timed": any(stage.predicted_ms is not None for stage in facts.trace), "cost_name": _cost_name(facts),
    }  # fmt: skip


def _cost_name(facts: Facts) -> str:
    """What to call the share that is left of the cost; a device's name would be too long for a column."""
    cost = facts.plan.cost
    if cost is None or cost.name == "macs":
        return "MACs"
    return "latency" if any(stage.predicted_ms is not None for stage in facts.trace) else cost.name


def _ways(trace: tuple[Stage, ...]) -> list[dict[str, Any]]:
    """The ways that were walked for trial, by their share of tokens."""
    return [
        {
            "tokens": words.percent(way.tokens), "loss": words.DASH if way.loss is None else f"{way.loss:.3f}",
            "taken": way.tokens == stage.token_share,
        }
        for stage in trace
        for way in sorted(stage.walks, key=lambda way: way.tokens)
    ]  # fmt: skip


def _share(trace: tuple[Stage, ...], mode: str) -> tuple[str, str]:
    ran = [stage for stage in trace if stage.mode == mode]
    count = f"{len(ran)} {'stage' if len(ran) == 1 else 'stages'}"
    return count, f"{words.percent(sum(s.saved for s in ran))} saved"


@dataclass(frozen=True)
class Scale:
    """A price axis that is linear near zero and logarithmic far from it: 0..1 from `low` to `high` (both asinh)."""

    unit: float
    low: float
    high: float


def price_scale(trace: tuple[Stage, ...]) -> Scale:
    """One axis for the prices of all stages, so that rows can be compared."""
    finite = [value for stage in trace for value in stage.costs.values() if math.isfinite(value)]
    unit = statistics.median(abs(v) for v in finite if v) if any(finite) else 1.0
    placed = [math.asinh(v / unit) for v in finite] or [0.0]
    low, high = min(*placed, 0.0), max(*placed, 0.0)
    return Scale(unit, low, high if high > low else low + 1.0)


def place(value: float, scale: Scale) -> float:
    """Where a price lies on the axis, 0..1; what is not finite lies at an end."""
    if not math.isfinite(value):
        return 0.0 if value == -math.inf else 1.0
    return round((math.asinh(value / scale.unit) - scale.low) / (scale.high - scale.low), 4)


# ---- parts, the device, examples, verification


def _parts(facts: Facts) -> dict[str, Any]:
    before, after = facts.metrics.dense.macs_by_part, facts.metrics.pruned.macs_by_part
    known = [name for name in PARTS if name in before]
    names = known + sorted(set(before) - set(PARTS) - {"total", "prefill", "decode_per_token"})
    whole = sum(before[name] for name in names) or 1.0
    rows = [
        {
            "name": name, "dense": words.amount(before[name]), "pruned": words.amount(after.get(name, 0)),
            "kept": words.percent(after.get(name, 0) / before[name]) if before[name] else words.DASH,
            "dense_share": before[name] / whole, "pruned_share": after.get(name, 0) / whole,
        }
        for name in names
    ]  # fmt: skip
    decode = [side.get("decode_per_token") for side in (before, after)]
    return {
        "rows": rows,
        "decode": None if None in decode else [words.amount(v) for v in decode],
        "biggest": max(rows, key=lambda row: row["dense_share"])["name"] if rows else None,
    }


def _device(facts: Facts) -> dict[str, Any] | None:
    told = facts.metrics.device
    if told is None:
        return None
    return latency.section(told, facts.metrics.measured, target=latency.target_of(facts.plan, told.predicted_ms.dense))


def _examples(facts: Facts, spec: str) -> dict[str, Any] | None:
    task = load_task(spec, load_processor(facts.folder), facts.model)
    if not isinstance(task, VQATask):
        return None
    cards = []
    for example in tokens.run_examples(facts.model, task, count=EXAMPLES):
        fate, side = example.fate, example.side
        cards.append(
            {
                "question": example.question, "answer": example.answer, "truth": example.truth,
                "right": example.answer == example.truth, "text": example.text, "patches": side * side,
                "pixelated": max(example.image.shape[:2]) < SMALL_IMAGE,
                "panels": [
                    ("the image", side * side, tokens.data_uri(example.image)),
                    ("after vision", len(fate.seen), tokens.data_uri(tokens.veil(example.image, fate.seen, side=side))),
                    ("last layer", len(fate.read), tokens.data_uri(tokens.veil(example.image, fate.read, side=side))),
                ],
            }
        )  # fmt: skip
    return {"cards": cards, "right": sum(card["right"] for card in cards)} if cards else None


def _checks(given: Mapping[str, Any]) -> dict[str, Any] | None:
    lines = verification.checks(given)
    judged = [line.passed for line in lines if line.passed is not None]
    programs = {line.program: [other for other in lines if other.program == line.program] for line in lines}
    return {"programs": programs, "passed": sum(judged), "judged": len(judged)} if lines else None
