"""The model card of a pruned folder: a `README.md` as the Hub reads it, from the plan and from what was measured."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from comp_edge.cost import MacsCost
from comp_edge.files import write_text
from comp_edge.plan import LayerPlan, Plan, StreamPlan
from comp_edge.remote_code import REFUSAL, auto_classes
from comp_edge.structure import empty_model
from comp_edge.units import KINDS, Kind, dense_plan, request_of

CARD_FILE = "README.md"
TEMPLATE = "card.md.j2"
# How the Hub calls what an auto class is for; the first that fits.
PIPELINES = {
    "AutoModelForVisualQuestionAnswering": "visual-question-answering",
    "AutoModelForImageTextToText": "image-text-to-text",
    "AutoModelForZeroShotImageClassification": "zero-shot-image-classification",
}
PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json")
SPLITS = {"test": "test_score", "validation": "val_score"}
ARROW, DASH, TIMES = "\u2192", "\u2013", "\u00d7"


@dataclass(frozen=True)
class Subject:
    """What a card tells of.

    Attributes:
        plan, dense: what is kept, and the plan that keeps everything for the same request.
        architecture, model_type: transformers' names of the model's class and config.
        base_model: the hub id of the model that was pruned; None where it is none.
        text_tokens: of the reference request, apart from its image tokens.
        macs: of one request by part, dense and pruned.
        parameters: dense and pruned.
        dtype: of the weights.
        processor: whether the folder holds one.
    """

    plan: Plan
    dense: Plan
    architecture: str
    model_type: str
    base_model: str | None
    text_tokens: int
    macs: tuple[Mapping[str, int], Mapping[str, int]]
    parameters: tuple[int, int]
    dtype: str
    processor: bool

    @property
    def base(self) -> str:
        """What to call the model that was pruned: the last part of its name or path (a path is nobody else's business)."""
        return " ".join(Path(self.plan.base).name.split()).replace("`", "'").replace("|", "/")

    @property
    def drops_tokens(self) -> bool:
        """Whether a stream computes on fewer tokens somewhere."""
        return self.plan.schedules != self.dense.schedules


def write_card(folder: Path, model: Any, plan: Plan, *, metrics: Mapping[str, Any] | None = None) -> Path:
    """Write the model card of a pruned folder, after everything else in it.

    Args:
        model: the pruned model.
        metrics: what `metrics.json` holds, where there is one.

    Returns:
        The file.

    Raises:
        InputError: it cannot be written.
    """
    path = folder / CARD_FILE
    processor = any((folder / name).is_file() for name in PROCESSOR_FILES)
    write_text(path, card_text(subject_of(model, plan, processor=processor), metrics))
    return path


def subject_of(model: Any, plan: Plan, *, processor: bool) -> Subject:
    """What a card tells of a pruned model; the dense one is built without storage, to be counted."""
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    whole = empty_model(config)
    request = request_of(model, plan)
    dense = dense_plan(whole, base=plan.base, request=request)
    count = MacsCost(model)
    return Subject(
        plan=plan,
        dense=dense,
        architecture=type(model).__name__,
        model_type=model.config.model_type,
        base_model=hub_id(plan.base),
        text_tokens=request.text_tokens,
        macs=(count.parts(dense), count.parts(plan)),
        parameters=tuple(sum(p.numel() for p in side.parameters()) for side in (whole, model)),
        dtype=str(model.dtype).removeprefix("torch."),
        processor=processor,
    )


def hub_id(base: str) -> str | None:
    """A model reference where it has the form of a hub id (org/name) and is no folder here."""
    try:
        validate_repo_id(base)
    except HFValidationError:
        return None
    return base if "/" in base and not Path(base).exists() else None


def card_text(subject: Subject, metrics: Mapping[str, Any] | None = None) -> str:
    """The card: YAML front matter for the Hub, then Markdown. Says nothing that was not measured or counted."""
    metrics = metrics or {}
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        keep_trailing_newline=True,
    )  # fmt: skip
    body = environment.get_template(TEMPLATE).render(_context(subject, metrics))
    front = front_matter(subject, metrics).to_yaml(line_break="\n")
    return f"---\n{front}\n---\n\n{body}"


def front_matter(subject: Subject, metrics: Mapping[str, Any]) -> ModelCardData:
    """What the Hub reads; `model-index` only where there are scores."""
    pipeline = _pipeline(subject)
    tags = ["comp-edge", "pruned"] + (["token-pruning"] if subject.drops_tokens else [])
    results = [
        EvalResult(
            task_type=pipeline or "other",
            dataset_type=_task(metrics) or "unnamed",
            dataset_name=_task(metrics) or "the task that the model was pruned on",
            dataset_split=split,
            metric_type="score",
            metric_name="task score, higher is better",
            metric_value=value,
        )
        for split in SPLITS
        if (value := _score(metrics, "pruned", split)) is not None
    ]
    return ModelCardData(
        library_name="transformers",
        base_model=subject.base_model,
        pipeline_tag=pipeline,
        tags=tags,
        license="other",
        license_name="that-of-the-base-model",
        license_link=f"https://huggingface.co/{subject.base_model}" if subject.base_model else None,
        model_name=_title(subject) if results else None,
        eval_results=results or None,
    )


def _context(subject: Subject, metrics: Mapping[str, Any]) -> dict[str, Any]:
    plan, cost = subject.plan, subject.plan.cost
    scored = [split for split in SPLITS if _score(metrics, "pruned", split) is not None]
    return {
        "title": _title(subject),
        "base": subject.base,
        "base_model": subject.base_model,
        "architecture": subject.architecture,
        "auto_class": _auto_class(subject),
        "what": _what(subject),
        "drops_tokens": subject.drops_tokens,
        "results": _results(subject, metrics),
        "scored": bool(scored),
        "task": _task(metrics),
        "request": _request(subject),
        "streams": [_stream(name, plan.streams[name], subject.dense.streams[name]) for name in plan.streams],
        "strategy": plan.strategy,
        "seed": plan.seed,
        "budget": ", ".join(f"{name} = {value}" for name, value in plan.budget.items() if value is not None),
        "steps": metrics.get("steps"),
        "cost": cost and {"name": cost.name, "dense": amount(cost.dense), "pruned": amount(cost.pruned)},
        "processor": subject.processor,
        "refusal": REFUSAL,
        "unmeasured": _unmeasured(subject, scored, metrics),
    }


def _title(subject: Subject) -> str:
    return f"{subject.base or subject.architecture}, pruned"


def _what(subject: Subject) -> str:
    done = [
        text
        for text, happened in (
            ("has fewer attention heads", _shrunk(subject, "heads")),
            ("has narrower feed-forward layers", _shrunk(subject, "ffn")),
            ("computes on fewer tokens from layer to layer", subject.drops_tokens),
        )
        if happened
    ]
    return " and ".join(done) or "keeps everything"


def _shrunk(subject: Subject, kind: Kind) -> bool:
    streams = ((subject.plan.streams[name], stream) for name, stream in subject.dense.streams.items())
    return any(
        getattr(a, kind) != getattr(b, kind) for x, y in streams for a, b in zip(x.layers, y.layers, strict=True)
    )


def _pipeline(subject: Subject) -> str | None:
    given = auto_classes(subject.architecture, subject.model_type)
    return next((tag for name, tag in PIPELINES.items() if name in given), None)


def _auto_class(subject: Subject) -> str:
    given = auto_classes(subject.architecture, subject.model_type)
    return next((name for name in PIPELINES if name in given), "AutoModel")


# ---- results


def _results(subject: Subject, metrics: Mapping[str, Any]) -> list[dict[str, str]]:
    rows = []
    for split in SPLITS:
        dense, pruned = (_score(metrics, side, split) for side in ("dense", "pruned"))
        if pruned is not None:
            dense_text = "not measured" if dense is None else f"{dense:.4f}"
            rows.append({"name": f"score, {split}", "dense": dense_text, "pruned": f"{pruned:.4f}"})
    macs = [side["total"] for side in subject.macs]
    for name, (dense, pruned) in (("MACs a request", macs), (f"parameters ({subject.dtype})", subject.parameters)):
        rows.append({"name": name, "dense": amount(dense), "pruned": f"{amount(pruned)} ({pruned / dense:.1%})"})
    return rows


def _score(metrics: Mapping[str, Any], side: str, split: str) -> float | None:
    value = (metrics.get(side) or {}).get(SPLITS[split])
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _task(metrics: Mapping[str, Any]) -> str | None:
    task = metrics.get("task")
    return task if isinstance(task, str) and task else None


def _request(subject: Subject) -> str:
    images, text = subject.plan.images, subject.text_tokens
    return f"{_count(images, 'image')} and {_count(text, 'text token')}, up to the first token of the answer"


def _unmeasured(subject: Subject, scored: list[str], metrics: Mapping[str, Any]) -> list[str]:
    found = []
    if "test" not in scored:
        found.append(
            "The score on a test split." if scored else "Any score: measure it on your task before you use it."
        )
    elif _score(metrics, "dense", "test") is None:
        found.append("The dense model's score on the test split.")
    cost = subject.plan.cost
    timed = cost is not None and cost.name != "macs"
    found.append(
        f"Latency: the figures of `{cost.name}` are a model's prediction."
        if timed
        else "Latency and memory on any device."
    )
    found.append("Anything but that task: what else the dense model could do may have suffered more.")
    found.append("Bias and safety, which pruning may change.")
    if subject.drops_tokens:
        found.append("Requests of another shape: the token counts above are for the request named there.")
    return found


# ---- what was pruned


def _stream(name: str, plan: StreamPlan, dense: StreamPlan) -> dict[str, Any]:
    heads, channels = (_units(plan.layers, dense.layers, kind) for kind in KINDS)
    tokens = (dense.schedule[0], plan.schedule[-1]) if dense.schedule else (0, 0)
    removed = sum(
        bool(getattr(before, kind)) and not getattr(after, kind)
        for before, after in zip(dense.layers, plan.layers, strict=True)
        for kind in KINDS
    )
    return {
        "name": name,
        "layers": len(plan.layers),
        "heads": heads,
        "channels": channels,
        "removed": removed,
        "tokens": _change(*tokens),
        "schedule": runs(plan.tokens) + (f"; {plan.delivered} handed on" if plan.delivered is not None else ""),
    }


def _units(after: Iterable[LayerPlan], before: Iterable[LayerPlan], kind: Kind) -> str:
    return _change(*(sum(len(getattr(layer, kind)) for layer in layers) for layers in (before, after)))


def _change(before: int, after: int) -> str:
    if before == 0:
        return DASH
    return f"{before:,}" if before == after else f"{before:,} {ARROW} {after:,}"


def runs(counts: Iterable[int]) -> str:
    """A schedule with repeats counted: 577 x3, 400 x9."""
    groups = [(value, len(list(group))) for value, group in itertools.groupby(counts)]
    return ", ".join(f"{value}" if times == 1 else f"{value} {TIMES}{times}" for value, times in groups)


def amount(value: float) -> str:
    """Three digits and a decimal prefix: 85.7 M, 1.30 G."""
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= factor:
            return f"{value / factor:#.3g}".rstrip(".") + f" {prefix}"
    return f"{value:.3g}"


def _count(number: int, thing: str) -> str:
    return f"{number:,} {thing}" + ("" if number == 1 else "s")
