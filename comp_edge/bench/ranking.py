"""Which importance foresees what a removal costs, and does that change while a model is pruned?

Of the dense model and of what `comp` makes of it on the way to the last reduction, at the stage in which each reduction is
reached: masks are over their fade, weights are as trained so far. There every importance is computed as a stage would, on its
calibration batches, and compared with what the loss on other training batches does when a unit or a token is removed alone.
Neither validation nor test batches are looked at for that.
"""

from __future__ import annotations

import functools
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from comp_edge.bench.method.pool import Failure, Job
from comp_edge.bench.parts import PARTS, finished_part, run_parts, write_part
from comp_edge.bench.ranking_statistics import agreement, fidelity
from comp_edge.bench.ranking_tokens import LIFTED, TOKENS, Taken, forks, measured_layers, rankings, take_tokens
from comp_edge.bench.ranking_units import (
    by_kind,
    importances,
    list_removals,
    mean_loss,
    removal_changes,
    scores_of,
)
from comp_edge.budget import Budget
from comp_edge.checkpoint import load_dense, load_processor
from comp_edge.digests import weights_digest
from comp_edge.errors import InputError
from comp_edge.options import flat
from comp_edge.session import STATE_FILE, Session
from comp_edge.settings import Progress, PruneConfig
from comp_edge.tasks import load_task, take_examples
from comp_edge.tasks.vqa import VQATask

EVALUATION_SEED = 770_001  # of the batches that changes are measured on, the same for all seeds of the pruning
REACHED = 1e-9  # a cost this much above what was asked for has reached it
POINTS = 100  # of progress, for each reduction


@dataclass(frozen=True)
class Extent:
    """How much is measured at each reduction.

    Attributes:
        questions: of training data, for removals of units.
        groups, channels: of each feed-forward layer (see `ranking_units`).
        image_questions: of training data, for removals of tokens.
        tokens: of each image and layer.
    """

    questions: int = 768
    groups: int = 16
    channels: int = 16
    image_questions: int = 384
    tokens: int = 24


@dataclass(frozen=True)
class Course:
    """One pruning, with the reductions at which it is looked into.

    Attributes:
        dense: what to load as the dense model; `model` is what it is called.
    """

    out: Path
    model: str
    dense: str
    task: str
    seed: int
    reductions: tuple[float, ...]
    config: PruneConfig = field(default_factory=PruneConfig)
    extent: Extent = field(default_factory=Extent)

    @property
    def last(self) -> float:
        """The reduction that the pruning ends at."""
        return max(self.reductions)

    @functools.cached_property
    def weights(self) -> str | None:
        """A digest of the dense model's weights."""
        return weights_digest(self.dense)

    @property
    def options(self) -> dict[str, Any]:
        """What a part's numbers depend on, besides its reduction and seed."""
        named = {"model": self.model, "task": self.task, "last_reduction": self.last}
        named["dense_weights"] = self.weights
        return {**named, **asdict(self.extent), **flat(self.config)}

    @property
    def work(self) -> Path:
        """What the pruning takes for its output; it is never written, but a checkpoint beside it."""
        return self.out / "work" / f"seed-{self.seed}"

    def part(self, reduction: float) -> Path:
        """The file of a reduction's numbers."""
        return self.out / PARTS / f"reduction-{reduction}-seed-{self.seed}.json"

    def finished(self, reduction: float) -> dict[str, Any] | None:
        """What it holds (see `finished_part`)."""
        return finished_part(self.part(reduction), self.options)

    def open(self) -> list[float]:
        """The reductions that are not measured yet."""
        return [reduction for reduction in sorted(self.reductions) if self.finished(reduction) is None]


def run(
    courses: Sequence[Course],
    *,
    workers: int,
    on_progress: Callable[[int, int, str], None],
) -> list[Failure]:
    """Measure what is not measured yet, each course in a worker process of its own.

    Returns:
        the courses that went wrong.

    Raises:
        InputError: the folder holds parts with other options, or another run is at work in it.
    """

    def list_jobs() -> Iterator[Job]:
        for course in courses:
            if count := len(course.open()):
                name = f"seed {course.seed}"
                yield Job(name, functools.partial(run_course, course), POINTS * count, name)

    return run_parts(courses[0].out, list_jobs, workers=workers, on_progress=on_progress)


def run_course(course: Course, tell: Callable[[int, str], None]) -> None:
    """Prune, or go on with it, and write a part at every reduction that has none.

    Args:
        tell: gets points of progress, and what is going on.

    Raises:
        InputError: a model or task that nothing can be measured of; see also `Session`.
    """
    open_ = course.open()
    if not open_:
        return
    watch = _Watch(course, open_, tell)
    watch.begin()
    watch.session.advance()
    shutil.rmtree(watch.session.work, ignore_errors=True)
    with suppress(OSError):  # others are at work in it
        course.work.parent.rmdir()


class _Watch:
    """A session that is looked into between its stages.

    Measuring changes neither weights nor masks, and a session draws its random numbers by its own seeds, so the pruning is
    what it would be without.
    """

    def __init__(self, course: Course, open_: list[float], tell: Callable[[int, str], None]) -> None:
        self.course, self.open, self.tell = course, open_, tell
        self.done, self.seen = 0, 0
        self.session: Session

    def begin(self) -> None:
        """Start the session, or take up one that was interrupted unless it has passed a state that is wanted."""
        self.session = self._session()
        if (self.session.work / STATE_FILE).is_file():
            self.session.resume(evaluate=False)
            if self._passed():
                shutil.rmtree(self.session.work)
                self.session = self._session()
                self.session.start(evaluate=False)
        else:
            self.session.start(evaluate=False)
        self.seen = self.session.stage
        self._visit()

    def _session(self) -> Session:
        course = self.course
        model, processor = load_dense(course.dense), load_processor(course.dense)
        task = load_task(course.task, processor, model)
        if not isinstance(task, VQATask):
            raise InputError(
                f"task {course.task!r} asks no questions about images, whose losses are what is compared; give one that does "
                "(a VQATask), such as digit_vqa."
            )
        return Session(
            model,
            task,
            budget=Budget(macs=round(1 - course.last, 12)),
            strategy="comp",
            out=course.work,
            seed=course.seed,
            config=course.config,
            base=course.model,
            deploy="any",
            on_progress=self._on_progress,
        )

    def _on_progress(self, progress: Progress) -> None:
        self.tell(self.done, progress.message or progress.phase)
        if self.session.stage > self.seen:  # told after the stage's checkpoint
            self.seen = self.session.stage
            self._visit()

    def _passed(self) -> bool:
        """Whether a reduction that is not measured was reached before the last stage."""
        costs = [1.0, *(stage["cost_fraction"] for stage in self.session.trace)]
        return len(costs) > 1 and any(_reached(costs[-2], reduction) for reduction in self.open)

    def _visit(self) -> None:
        cost = self.session.proposer.price(self.session.state)
        for reduction in [r for r in self.open if _reached(cost, r)]:

            def tell(share: float, name: str = f"reduction {reduction}") -> None:
                self.tell(self.done + round(POINTS * share), f"measure {name}")

            record = measure(self.session, self.course.extent, reduction=reduction, tell=tell)
            labels = {"model": self.course.model, "seed": self.course.seed, "reduction": reduction, "cost": cost}
            write_part(self.course.part(reduction), {**labels, **record}, self.course.options)
            self.open.remove(reduction)
            self.done += POINTS


def _reached(cost: float, reduction: float) -> bool:
    return cost <= 1 - reduction + REACHED


def measure(
    session: Session, extent: Extent, *, reduction: float, tell: Callable[[float], None] = lambda share: None
) -> dict[str, Any]:
    """Rank correlations in the state that a session is in.

    Args:
        reduction: draws what is sampled, together with the session's seed.
        tell: gets the share that is done.

    Returns:
        `rho`: by kind of removal its number `n`, the correlations of each importance (see `fidelity`), and the `agreement`
        of the changes themselves; `units`: the single measurements of units.
    """
    setting, state = session.setting, session.state
    session.model.eval()
    rng = np.random.default_rng([session.seed, round(1e6 * reduction)])
    removals = list_removals(state, session.streams, groups=extent.groups, channels=extent.channels, rng=rng)
    layers = [layer for layer in measured_layers(session.schedule) if state.tokens["vision"][layer] > 2]
    passes = len(removals) + 2 * len(layers) * extent.tokens
    done = 0

    def step() -> None:
        nonlocal done
        done += 1
        tell(min(done / passes, 1.0))

    started = time.perf_counter()
    batches = evaluation_batches(session.task, extent.questions)
    foreseen = {name: scores_of(removals, units) for name, units in importances(setting, state, rng).items()}
    ranked = time.perf_counter()
    changes = removal_changes(setting, state, removals, batches, step)
    sites = sorted({removal.site for removal in removals})
    places = np.array([sites.index(removal.site) for removal in removals])
    rho = {
        kind: correlations({name: s[at] for name, s in foreseen.items()}, changes[at], places[at])
        for kind, at in by_kind(removals)
    }
    removed = time.perf_counter()
    images = evaluation_batches(session.task, extent.image_questions)
    for kind, taken in _tokens(session, images, layers, extent.tokens, rng, step).items():
        rho[kind] = correlations(*rankings(taken))
    seconds = {"importance": ranked - started, "units": removed - ranked, "tokens": time.perf_counter() - removed}
    return {
        "stage": session.stage,
        "val_score": session.score,
        "loss": mean_loss(setting, state, batches),
        "token_layers": layers,
        "rho": rho,
        "units": [
            {"kind": r.kind, **r.site._asdict(), "units": r.units, "changes": changes[i].tolist()}
            | {"importances": {name: float(scores[i]) for name, scores in foreseen.items()}}
            for i, r in enumerate(removals)
        ],
        "seconds": {name: round(value, 2) for name, value in seconds.items()},
    }


def _tokens(
    session: Session,
    batches: Sequence[dict[str, Tensor]],
    layers: Iterable[int],
    count: int,
    rng: np.random.Generator,
    step: Callable[[], None],
) -> dict[str, list[Taken]]:
    """What was taken away before each layer, in the model as it is and with drops lifted (see `ranking_tokens`)."""
    found: dict[str, list[Taken]] = {}
    options = {"count": count, "rng": rng, "tell": step}
    for layer in layers:
        taken = take_tokens(session.setting, session.state, batches, layer, lift=False, **options)
        found.setdefault(TOKENS, []).append(taken)
        if forks(session.state, layer):
            taken = take_tokens(session.setting, session.state, batches, layer, lift=True, **options)
        found.setdefault(LIFTED, []).append(taken)
    return found


def correlations(importances: dict[str, np.ndarray], changes: np.ndarray, layers: np.ndarray) -> dict[str, Any]:
    """Of removals of one kind: `n`, `importances` (see `fidelity`) and `agreement`.

    Args:
        importances: [n] by name.
        changes: [n, 3], measured on everything and on two halves of it.
        layers: [n], in which ranking each of them stands.
    """
    return {
        "n": len(changes),
        "importances": {name: fidelity(scores, changes[:, 0], layers) for name, scores in importances.items()},
        "agreement": agreement(changes[:, 1:], layers),
    }


def evaluation_batches(task: Any, questions: int) -> list[dict[str, Tensor]]:
    """At least so many training questions, always the same."""
    return list(take_examples(task.train_batches(EVALUATION_SEED), questions))
