"""What cannot be pruned is told before anything is done: one sentence, exit code 2, nothing written."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import comp_edge
from comp_edge.cli.main import main
from comp_edge.errors import InputError
from comp_edge.feasibility import check_score
from comp_edge.tasks.pairs import PairTask
from comp_edge.tasks.vqa import Split
from tests.comp_edge.test_pruning import QUICK
from tests.families import case_named
from tests.tiny import TinyVQA


def refused(model: Any, task: Any, out: Path, **options: Any) -> str:
    """The sentence of a refusal that leaves nothing behind."""
    options = {"budget": comp_edge.Budget(macs=0.4), "config": QUICK, **options}
    with pytest.raises(InputError) as caught:
        comp_edge.prune(model, task, out=out / "out", **options)
    assert not list(out.iterdir())
    sentence = str(caught.value)
    assert sentence.endswith(".") and "\n" not in sentence
    return sentence


class Constant(TinyVQA):
    """Whatever is answered counts the same."""

    value = 0.5

    def score(self, model: Any, batches: Any) -> float:
        return self.value


@pytest.mark.parametrize("strategy", ["comp", "probe", "joint"])
def test_a_constant_score(make_model: Any, processor: Any, tmp_path: Path, strategy: str) -> None:
    sentence = refused(make_model(), Constant(processor), tmp_path, strategy=strategy)
    assert "validation score of task 'tiny_vqa' is 0.5000 for the model and also without any of its heads" in sentence


def test_a_score_of_zero_is_let_pass_where_nothing_was_learned() -> None:
    """That is a model with random weights, pruned to see what it costs. One that has learned is scored wrongly."""

    def check(task: Any, dense: float, ruined: float, losses: tuple[float, float] = (5.0, 5.0)) -> None:
        check_score(task, dense=dense, ruined=lambda: ruined, losses=lambda: losses)

    class Named:
        def __init__(self, name: str) -> None:
            self.name = name

    check(Named("mine"), 0.3, 0.2)
    check(Named("mine"), 0.2, 0.3)
    check(Named("mine"), 0.0, 0.0)
    check(Named("synthetic"), 0.25, 0.25)
    with pytest.raises(InputError, match="score of task 'mine' is 0.0000"):
        check(Named("mine"), 0.0, 0.0, losses=(0.4, 5.0))
    with pytest.raises(InputError, match="score of task 'mine' is 0.2500"):
        check(Named("mine"), 0.25, 0.25)


def test_the_ruin_is_not_kept(make_model: Any, processor: Any) -> None:
    """What is masked to see whether the score tells anything is there again when the pruning begins."""

    class Counting(TinyVQA):
        def score(self, model: Any, batches: Any) -> float:
            with torch.no_grad():
                return -float(self.loss(model, next(iter(batches))))

    config = replace(QUICK, stage_steps=0, final_steps=0)
    model = make_model()
    expected = Counting(processor).score(model, list(Counting(processor).val_batches()))
    result = comp_edge.prune(
        model, Counting(processor), budget=comp_edge.Budget(macs=0.9), config=config, evaluate=False
    )
    assert result.metrics["dense"]["val_score"] == pytest.approx(expected, abs=1e-5)


class Empty(TinyVQA):
    def __init__(self, processor: Any, split: str, images: bool) -> None:
        super().__init__(processor)
        self.empty, self.images = split, images

    def load_split(self, split: str) -> Split:
        found = super().load_split(split)
        if split != self.empty:
            return found
        return Split(images=found.images if self.images else found.images[:0], questions=[])


@pytest.mark.parametrize("images", [True, False], ids=["no questions", "no images"])
@pytest.mark.parametrize(("split", "name"), [("val", "validation"), ("train", "training")])
def test_an_empty_split(make_model: Any, processor: Any, tmp_path: Path, split: str, name: str, images: bool) -> None:
    assert f"the task has no {name} batches" in refused(make_model(), Empty(processor, split, images), tmp_path)


def test_a_task_of_ones_own_without_batches(make_model: Any, tiny_task: Any, tmp_path: Path) -> None:
    class Mine:
        """Nothing that the built-in kinds have but the protocol."""

        def __init__(self, lacks: str) -> None:
            self.lacks = lacks

        def train_batches(self, seed: int) -> Iterator[dict[str, Tensor]]:
            return iter(()) if self.lacks == "training" else tiny_task.train_batches(seed)

        def val_batches(self) -> Iterator[dict[str, Tensor]]:
            return iter(()) if self.lacks == "validation" else tiny_task.val_batches()

        test_batches = val_batches

        def example_inputs(self) -> dict[str, Tensor]:
            return tiny_task.example_inputs()

    for lacks in ("training", "validation"):
        assert f"the task has no {lacks} batches" in refused(make_model(), Mine(lacks), tmp_path)


def test_modes_that_the_model_lacks(make_model: Any, tiny_task: Any, tmp_path: Path) -> None:
    def sentence(*modes: str, model: Any = None, **options: Any) -> str:
        config = replace(QUICK, modes=modes)
        return refused(model or make_model(), tiny_task, tmp_path, config=config, **options)

    known = "is not one of the model's: vision_params, language_params"
    assert sentence("cross_params") == f"mode 'cross_params' {known}, vision_tokens, language_tokens."
    assert (
        f"mode 'vision_tokens' {known}, language_tokens (tokens are dropped between layers, and stream 'vision' has one)"
        in (sentence("vision_tokens", model=make_model(vision_layers=1)))
    )
    assert "no mode to use" in sentence("vision_params", strategy="tokens")
    assert "without language_tokens as 'stock' is to be deployed" in sentence("language_tokens", deploy="stock")


def test_a_budget_that_only_other_modes_could_reach(make_model: Any, tiny_task: Any, tmp_path: Path) -> None:
    """The sentence says how far those that may run can go, how far all could, and which could alone."""

    def sentence(keep: float, **options: Any) -> str:
        return refused(make_model(), tiny_task, tmp_path, budget=comp_edge.Budget(macs=keep), **options)

    asks = "the budget asks for {:.4f} of the dense cost; the lowest that "
    found = sentence(0.3, config=replace(QUICK, modes=("vision_tokens",)))
    farther = r"vision_tokens can reach is 0\.\d+; all modes together can reach 0\.27\d+\."
    assert re.fullmatch(asks.format(0.3) + farther, found)
    found = sentence(0.62, config=replace(QUICK, modes=("language_tokens",)))
    assert found.startswith(asks.format(0.62) + "language_tokens can reach is 0.")
    assert re.search(r"; all modes together can reach 0\.27\d+, language_params alone 0\.5\d+\.$", found)
    found = sentence(0.3, strategy="tokens")
    assert found.startswith(asks.format(0.3) + "vision_tokens, language_tokens can reach is 0.")
    found = sentence(0.01)
    everything = "vision_params, language_params, vision_tokens, language_tokens can reach is"
    assert re.fullmatch(asks.format(0.01) + everything + r" 0\.27\d+\.", found)


def test_streams_with_one_layer_or_head(make_model: Any, tiny_task: Any, tmp_path: Path) -> None:
    """They are pruned as far as they go, and a budget beyond that is told why."""
    small = {"vision_layers": 1, "language_layers": 1, "heads": 1, "kv_heads": 1}
    for strategy in ("comp", "probe"):
        plan = comp_edge.prune(
            make_model(**small), tiny_task, budget=comp_edge.Budget(macs=0.8), config=QUICK, strategy=strategy,
            evaluate=False,
        ).plan  # fmt: skip
        assert plan.cost.pruned <= 0.8 * plan.cost.dense
        assert all(layer.heads == (0,) for stream in plan.streams.values() for layer in stream.layers)
    sentence = refused(make_model(**small), tiny_task, tmp_path)
    for note in ("stream 'vision' has one layer", "the first layer of stream 'language' keeps its only head"):
        assert note in sentence


class Pairs(PairTask):
    """Sixteen squares of noise and their names."""

    def load_split(self, split: str) -> Split:
        rng = np.random.default_rng(len(split))
        images = rng.integers(0, 255, (16, 64, 64, 3), dtype=np.uint8)
        return Split(images=images, questions=[[i, f"text {i}"] for i in range(16)])


def test_batches_that_cannot_be_cut(make_model: Any, tiny_task: Any, tmp_path: Path) -> None:
    config = replace(QUICK, accumulate=2)
    model = case_named("clip").model()

    class Clip(Pairs):
        """A batch as a CLIP processor would make it."""

        def batch(self, split: str, pairs: list[int]) -> dict[str, Tensor]:
            return {**case_named("clip").inputs(pairs, padding=None), "pair_ids": torch.tensor(pairs)}

    task, little = Clip(processor_named("CLIPProcessor")), comp_edge.Budget(macs=0.9)
    sentence = refused(model, task, tmp_path, config=config, budget=little)
    assert "task 'pairs' compares the examples of a batch with each other" in sentence
    assert "has 12 examples and cannot be cut into 13 parts" in (
        refused(make_model(), tiny_task, tmp_path, config=replace(QUICK, accumulate=13))
    )
    sentence = refused(make_model(), tiny_task, tmp_path, config=replace(config, distill_hidden=0.5))
    assert "distill_hidden 0.5" in sentence


def processor_named(name: str) -> Any:
    return type(name, (), {})()


TASKS = """
from tests.comp_edge.test_feasibility import Constant as _Constant, Empty as _Empty


class Constant(_Constant):
    pass


class NoValidation(_Empty):
    def __init__(self, processor):
        super().__init__(processor, "val", True)
"""


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--task", "tasks.py:Constant"], "such a score cannot steer the pruning"),
        (["--task", "tasks.py:NoValidation"], "the task has no validation batches"),
        (["--modes", "cross_params"], "mode 'cross_params' is not one of the model's"),
        (["--modes", "vision_tokens", "--keep", "0.1"], "all modes together can reach"),
        (["--accumulate", "50"], "cannot be cut into 50 parts"),
        (["--accumulate", "0"], "'0' is not an integer of at least 1"),
    ],
)
def test_on_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, options: list[str], says: str
) -> None:
    (tmp_path / "tasks.py").write_text(textwrap.dedent(TASKS))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path)
    task = [] if "--task" in options else ["--task", str(Path(__file__).parents[1] / "tiny.py") + ":TinyVQA"]
    command = ["prune", "--model", "llava-digits", *task, "--stages", "2", "--val-examples", "30", "-o", "work/out"]
    try:
        code = main([*command, *options])
    except SystemExit as stop:
        code = stop.code
    said = capsys.readouterr()
    assert code == 2 and not said.out and not list((tmp_path / "work").iterdir())
    lines = [line for line in said.err.splitlines() if "prune: " in line]
    assert says in lines[-1] and "Traceback" not in said.err
