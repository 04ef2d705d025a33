"""The dense models of a run: shipped, given, or trained here; and what they score."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from comp_edge.bench.method.grid import Target
from comp_edge.checkpoint import CONFIG_FILE, load_dense, load_processor
from comp_edge.digests import weights_digest
from comp_edge.errors import InputError
from comp_edge.files import read_json, write_json
from comp_edge.plan import PLAN_FILE
from comp_edge.reference import REFERENCE_MODELS, asset_folder
from comp_edge.tasks import BUILT_IN, load_task, take_examples
from comp_edge.train import CHECKPOINT, METRICS_FILE, save_trained, size_batches, train

SHIPPED_SEED = 0
RECIPE_FILE = "recipe.json"
SCORING_STEPS = 50  # what scoring counts as in the progress, in optimizer steps
Tell = Callable[[int, str], None]  # steps done, what is going on


@dataclass(frozen=True)
class Recipe:
    """How a dense model is trained; the values are `comp-edge train`'s own (see `comp_edge.cli.train`).

    Attributes:
        images: of a batch with several questions an image.
        pairs: of a batch of image-text pairs; None leaves it to the task.
    """

    steps: int
    images: int
    pairs: int | None
    lr: float
    matrix_lr: float


@dataclass(frozen=True)
class DenseModel:
    """A dense model of a run.

    Attributes:
        folder: where it lies, or will when it was trained.
        record: the file that holds its score.
        recipe: how to train it; None where it is shipped or given.
    """

    target: Target
    seed: int
    folder: Path
    record: Path
    recipe: Recipe | None
    test_examples: int | None = None

    @property
    def key(self) -> str:
        """A name that no other dense model has."""
        return f"{self.target.slug}-{self.seed}"

    @property
    def work(self) -> Path:
        """Where its training keeps its checkpoint."""
        return self.folder.with_name(self.folder.name + ".work")

    @property
    def weights(self) -> str | None:
        """A digest of the weights; None where there are none yet."""
        return weights_digest(self.folder) if self.folder.is_dir() else None

    @property
    def complete(self) -> bool:
        """Whether it is there, and its score as this run needs it."""
        if self.weights is None or not self.record.is_file():
            return False
        known = read_json(self.record, what="record of a dense model")
        return known["dense_weights"] == self.weights and known["test_examples"] == self.test_examples

    @property
    def scores(self) -> dict[str, Any]:
        """What `prepare` recorded: `test_score`, `dense_weights`."""
        return read_json(self.record, what="record of a dense model")

    @property
    def cost(self) -> int:
        """What `prepare` counts as, in optimizer steps."""
        trains = self.recipe is not None and self.weights is None
        return SCORING_STEPS + (self.recipe.steps if trains else 0)


def find_dense(
    target: Target,
    seed: int,
    *,
    out: Path,
    given: Path | None,
    recipe: Callable[[Target], Recipe],
    test_examples: int | None,
) -> DenseModel:
    """Where the dense model of a seed comes from: the given folder, the package (seed 0, on the task that it was trained
    on), or training.

    Args:
        out: the run's folder.
        given: a folder with folders NAME-SEED.

    Raises:
        InputError: a given model is no dense model, or was trained on another task or with another seed; what was trained
            here before was trained otherwise; a model that can only be given is not there.
    """
    name = f"{target.slug}-{seed}"
    trained = out / "dense" / name
    options = {
        "target": target,
        "seed": seed,
        "record": trained.with_name(f"{name}.json"),
        "test_examples": test_examples,
    }
    if given is not None and (folder := given / name).is_dir():
        _check_given(folder, target, seed)
        return DenseModel(folder=folder, recipe=None, **options)
    if target.model not in REFERENCE_MODELS:
        raise InputError(
            f"dense model {str((given or Path()) / name)!r} does not exist; --dense must hold every seed's."
        )
    shipped = asset_folder(target.model)
    if seed == SHIPPED_SEED and (shipped / METRICS_FILE).is_file():
        if read_json(shipped / METRICS_FILE, what="metrics").get("task") == target.task:
            return DenseModel(folder=shipped, recipe=None, **options)
    dense = DenseModel(folder=trained, recipe=recipe(target), **options)
    _check_trained(dense)
    return dense


def _check_given(folder: Path, target: Target, seed: int) -> None:
    if not (folder / CONFIG_FILE).is_file():
        raise InputError(f"{str(folder)!r} is not a model folder: it has no {CONFIG_FILE}.")
    if (folder / PLAN_FILE).is_file():
        raise InputError(f"{str(folder)!r} is pruned already; give a dense model.")
    if not (folder / METRICS_FILE).is_file():
        return
    metrics = read_json(folder / METRICS_FILE, what="metrics")
    task = metrics.get("task", target.task)
    if task != target.task and task in BUILT_IN:
        raise InputError(f"{str(folder)!r} was trained on {task!r}; {target.label} needs a model of {target.task!r}.")
    if metrics.get("seed", seed) != seed:
        raise InputError(f"{str(folder)!r} was trained with seed {metrics['seed']}; its name says {seed}.")


def _check_trained(dense: DenseModel) -> None:
    for file in (dense.folder / METRICS_FILE, dense.work / RECIPE_FILE):
        if file.is_file():
            known = read_json(file, what="record of a training")
            for name, value in asdict(dense.recipe).items():
                if known.get(name) != value:
                    raise InputError(
                        f"{str(file.parent)!r} is trained with {name} {known.get(name)}, this run has {value}; give the "
                        "same options or another --out."
                    )


def prepare(dense: DenseModel, tell: Tell) -> None:
    """Train the model where it is to be trained, and score it on the test split."""
    steps = 0
    if dense.recipe is not None and dense.weights is None:
        steps = dense.recipe.steps
        _train(dense, tell)
    tell(steps, "score")
    model = load_dense(dense.folder)
    task = load_task(dense.target.task, load_processor(dense.folder), model)
    record = {
        "model": dense.target.label,
        "task": dense.target.task,
        "dense_seed": dense.seed,
        "test_score": task.score(model, test_batches(task, dense.test_examples)),
        "test_examples": dense.test_examples,
        "dense_weights": dense.weights,
        "trained_here": dense.recipe is not None,
    }
    write_json(dense.record, record)


def test_batches(task: Any, count: int | None) -> Iterable[dict[str, Any]]:
    """The test split, or whole batches of its beginning with at least so many examples."""
    batches = task.test_batches()
    return batches if count is None else take_examples(batches, count)


def _train(dense: DenseModel, tell: Tell) -> None:
    """As `comp-edge train` does it, and into a folder like its."""
    recipe, target = dense.recipe, dense.target
    model, processor = REFERENCE_MODELS[target.model](dense.seed)
    task: Any = load_task(target.task, processor, model)
    size_batches(task, images=recipe.images, pairs=recipe.pairs)
    write_json(dense.work / RECIPE_FILE, asdict(recipe))
    started = time.time()
    result = train(
        model,
        task,
        folder=dense.work,
        steps=recipe.steps,
        lr=recipe.lr,
        matrix_lr=recipe.matrix_lr,
        seed=dense.seed,
        resume=(dense.work / CHECKPOINT).is_file(),
        on_step=lambda step, loss: tell(step, f"train, loss {loss:.3f}"),
    )
    save_trained(
        dense.folder,
        model,
        processor,
        task,
        task_name=target.task,
        steps=result.steps,
        seed=dense.seed,
        seconds=time.time() - started,
        recipe=asdict(recipe),
    )
    shutil.rmtree(dense.work, ignore_errors=True)
