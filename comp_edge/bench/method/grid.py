"""What a run consists of: models on tasks, methods, reductions and pairs of seeds; one cell each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from comp_edge.errors import InputError
from comp_edge.options import Method, flat
from comp_edge.reference import REFERENCE_MODELS
from comp_edge.tasks import BUILT_IN, task_class

DEFAULT_TASKS = {"llava-digits": "digit_vqa", "blip-digits": "digit_vqa", "clip-digits": "digit_pairs"}
STEPS = 300  # optimizer steps of every cell, those after the plan is frozen included


@dataclass(frozen=True)
class Target:
    """A model on a task.

    Attributes:
        label: the model's name, and behind `@` its task where that is not the model's own.
    """

    label: str
    model: str
    task: str

    @property
    def slug(self) -> str:
        """The label as part of a file name."""
        return slug(self.label)


@dataclass(frozen=True)
class Cell:
    """One pruning: of a dense model with a seed of its own, by a method, to a reduction, with a seed for the pruning.

    Attributes:
        test_examples: the test score is that of the first so many test examples; None for all.
    """

    target: Target
    method: Method
    reduction: float
    dense_seed: int
    prune_seed: int
    test_examples: int | None = None

    @property
    def key(self) -> str:
        """A file name that no other cell has."""
        seeds = f"d{self.dense_seed}-p{self.prune_seed}"
        return f"{self.target.slug}__{slug(self.method.label)}__{self.reduction}__{seeds}"

    @property
    def labels(self) -> dict[str, Any]:
        """What says in the results which cell it is."""
        return {
            "model": self.target.label,
            "task": self.target.task,
            "strategy": self.method.label,
            "reduction": self.reduction,
            "dense_seed": self.dense_seed,
            "prune_seed": self.prune_seed,
        }

    @property
    def name(self) -> str:
        """For messages."""
        return f"{self.target.label} {self.method.label} {self.reduction} seeds {self.dense_seed}/{self.prune_seed}"

    @property
    def steps(self) -> int:
        """Optimizer steps."""
        return self.method.config.total_steps

    def options(self, dense_weights: str | None) -> dict[str, Any]:
        """What the result depends on besides the labels.

        Args:
            dense_weights: a digest of the dense model's weights, where they are known already.
        """
        known = {} if dense_weights is None else {"dense_weights": dense_weights}
        # As it is resolved: defaults may be others in another version.
        config = flat(self.method.config.of(self.method.strategy))
        return {"task": self.target.task, "test_examples": self.test_examples, **config, **known}


def slug(text: str) -> str:
    """A text as part of a file name, different for different texts."""
    return quote(text, safe="@=,").replace("%3A", "+")


def parse_target(text: str, *, dense: Path | None) -> Target:
    """`MODEL` or `MODEL@TASK`.

    Args:
        dense: a folder with dense models; what lies there is known beside the reference models.

    Raises:
        InputError: unknown model or task, or no task is given for a model that has none of its own.
    """
    model, _, task = text.partition("@")
    own = DEFAULT_TASKS.get(model)
    lies_there = dense is not None and any(dense.glob(f"{slug(text)}-*/config.json"))
    if model not in REFERENCE_MODELS and not lies_there:
        raise InputError(
            f"unknown model {model!r}: give one of {', '.join(sorted(REFERENCE_MODELS))}, or with --dense a folder in "
            f"which {slug(text)}-SEED lies for every dense seed."
        )
    if not task and own is None:
        raise InputError(f"model {model!r} has no task of its own; give {model}@TASK.")
    task_class(task or own)
    return Target(label=model if task in ("", own) else text, model=model, task=task or own)


def default_models() -> list[str]:
    """The reference models whose task is there."""
    return [name for name, task in DEFAULT_TASKS.items() if name in REFERENCE_MODELS and task in BUILT_IN]


def seed_pairs(dense: Sequence[int], prune: Sequence[int] | None, *, cross: bool) -> list[tuple[int, int]]:
    """Pairs of dense seed and pruning seed, in an order in which every beginning is as complete as it can be.

    Args:
        prune: by default the same as `dense`.
        cross: every combination, instead of the first with the first and so on.

    Raises:
        InputError: without `cross`, as many of both are needed.
    """
    prune = dense if prune is None else prune
    if cross:
        places = [(i, j) for i in range(len(dense)) for j in range(len(prune))]
        # Squares that grow: the first seeds in all their combinations, then one more of each.
        places.sort(key=lambda place: (max(place), place))
    elif len(dense) != len(prune):
        raise InputError(
            f"{len(dense)} dense seeds and {len(prune)} pruning seeds make no pairs; give as many of both, or --cross."
        )
    else:
        places = [(i, i) for i in range(len(dense))]
    return list(dict.fromkeys((dense[i], prune[j]) for i, j in places))


def grid(
    targets: Sequence[Target],
    methods: Sequence[Method],
    reductions: Sequence[float],
    pairs: Sequence[tuple[int, int]],
    *,
    test_examples: int | None,
) -> list[Cell]:
    """All cells, seed by seed: a run that is stopped has every method at every reduction with the first seeds."""
    return [
        Cell(target, method, reduction, dense, prune, test_examples)
        for dense, prune in pairs
        for target in targets
        for reduction in reductions
        for method in methods
    ]
