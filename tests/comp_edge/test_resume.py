"""A run that was stopped, by a kill or by a loss that is not finite, goes on to the same plan and weights."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import comp_edge
from comp_edge.cli.main import main
from comp_edge.errors import InputError
from comp_edge.optim import load_state, save_state
from comp_edge.session import FINE_TUNING, STATE_FILE
from tests.comp_edge.killing import POINTS
from tests.comp_edge.test_pruning import QUICK
from tests.tiny import TinyVQA

ROOT = Path(__file__).parents[2]
SHORT = replace(QUICK, stages=3)


def prune(model: Any, task: Any, **options: Any) -> comp_edge.PruneResult:
    options = {"budget": comp_edge.Budget(macs=0.75), "config": SHORT, "base": "tiny", "evaluate": False, **options}
    return comp_edge.prune(model, task, **options)


def lines(folder: Path) -> list[dict[str, Any]]:
    """The trace without what was measured."""
    found = [json.loads(line) for line in (folder / "trace.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("seconds", "peak_memory_bytes")} for line in found]


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["comp", "probe"])
def test_killed_wherever_it_was(tmp_path: Path, strategy: str) -> None:
    """SIGKILL at sixteen points of one run: before its first stage, in stages and between them, in fine-tuning, in saving."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.comp_edge.killing", strategy, str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = {"while the folders are exchanged": "nothing", "before the checkpoint is removed": "new"}
    assert done.stdout.splitlines() == [f"{point}: {found.get(point, 'old')}" for point in POINTS]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["killed", "whole"]  # nothing hidden, no checkpoint
    for name in ("plan.json", "model.safetensors", "config.json"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    assert lines(tmp_path / "killed") == lines(tmp_path / "whole")


def test_before_the_dense_model_is_scored(
    make_model: Any, processor: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is a checkpoint already, without weights: nothing has changed them."""

    class Broken(TinyVQA):
        def score(self, model: Any, batches: Any) -> float:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prune(make_model(), Broken(processor), out=tmp_path / "out")
    assert (tmp_path / "out.work" / STATE_FILE).stat().st_size < 100_000
    with pytest.raises(InputError, match="interrupted run had seed 0, this one has 1"):
        prune(make_model(), TinyVQA(processor), out=tmp_path / "out", seed=1, resume=True)
    with pytest.raises(InputError, match="interrupted run had weights '.*', this one has '.*'; resume with the same"):
        prune(make_model(seed=5), TinyVQA(processor), out=tmp_path / "out", resume=True)
    other = TinyVQA(processor)
    other.name = "other"
    with pytest.raises(InputError, match="interrupted run had task 'tiny_vqa', this one has 'other'"):
        prune(make_model(), other, out=tmp_path / "out", resume=True)
    tensors, progress = load_state(tmp_path / "out.work" / STATE_FILE)
    older = {name: value for name, value in progress.items() if name != "measured"}
    save_state(tmp_path / "out.work" / STATE_FILE, tensors, older)
    with pytest.raises(InputError, match="another version of comp-edge: it does not say 'measured'; start afresh"):
        prune(make_model(), TinyVQA(processor), out=tmp_path / "out", resume=True)
    save_state(tmp_path / "out.work" / STATE_FILE, tensors, progress)
    resumed = prune(make_model(), TinyVQA(processor), out=tmp_path / "out", resume=True)
    assert resumed.plan == prune(make_model(), TinyVQA(processor)).plan
    assert not (tmp_path / "out.work").exists()


class Poisoned(TinyVQA):
    """One training batch, the given one of a chunk, has pixels that are not numbers: the next time it is drawn."""

    def __init__(self, processor: Any, chunk: int = 1, batch: int = 1) -> None:
        super().__init__(processor)
        self.where, self.taken = (17 + chunk, batch), False

    def train_batches(self, seed: int) -> Iterator[dict[str, torch.Tensor]]:
        for index, batch in enumerate(super().train_batches(seed)):
            if (seed, index) == self.where and not self.taken:
                self.taken, batch["pixel_values"] = True, batch["pixel_values"] * float("nan")
            yield batch


@pytest.mark.parametrize(
    ("strategy", "chunk", "batch", "where"),
    [
        ("comp", 0, 0, "step 1 of stage 1"),
        ("comp", 2, 1, "step 2 of stage 3"),
        ("probe", FINE_TUNING, 1, "step 2 of fine-tuning"),
    ],
)
def test_a_loss_that_is_not_finite(
    make_model: Any, processor: Any, tmp_path: Path, strategy: str, chunk: int, batch: int, where: str
) -> None:
    """The error says where; nothing of that step is kept, and the run can be resumed."""
    whole = prune(make_model(), TinyVQA(processor), strategy=strategy, out=tmp_path / "whole")
    checkpoint = tmp_path / "cut.work" / STATE_FILE
    task, written = Poisoned(processor, chunk, batch), []

    def watch(progress: Any) -> None:
        written[:] = [checkpoint.read_bytes()]

    with pytest.raises(FloatingPointError, match=rf"loss nan with gradient norm nan is not finite, in {where}$"):
        prune(make_model(), task, strategy=strategy, out=tmp_path / "cut", on_progress=watch)
    assert not (tmp_path / "cut").exists() and task.taken
    assert bool(written) == (chunk > 0) and all(checkpoint.read_bytes() == content for content in written)
    resumed = prune(make_model(), task, strategy=strategy, out=tmp_path / "cut", resume=True)
    assert resumed.plan == whole.plan
    for name, value in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], value), name


def test_a_run_goes_on_more_gently(make_model: Any, processor: Any, tmp_path: Path) -> None:
    """With another learning rate, or with less memory; what has been decided stays, and so must all other options."""
    with pytest.raises(FloatingPointError):
        prune(make_model(), Poisoned(processor), out=tmp_path / "cut")
    with pytest.raises(InputError, match="interrupted run had config"):
        prune(make_model(), TinyVQA(processor), out=tmp_path / "cut", config=replace(SHORT, stages=5), resume=True)
    gentle = replace(SHORT, lr=1e-4, matrix_lr=1e-4, accumulate=2, checkpointing=True)
    result = prune(make_model(), TinyVQA(processor), out=tmp_path / "cut", config=gentle, resume=True)
    assert result.plan.cost.pruned <= 0.75 * result.plan.cost.dense


def test_a_score_that_is_not_finite(make_model: Any, processor: Any) -> None:
    class Task(TinyVQA):
        scores = iter([0.5, 0.1, 0.4, float("nan")])

        def score(self, model: Any, batches: Any) -> float:
            return next(self.scores)

    with pytest.raises(FloatingPointError, match="validation score nan is not finite, after 1 stages"):
        prune(make_model(), Task(processor))


TASK = """
from pathlib import Path
from tests.tiny import TinyVQA


class Once(TinyVQA):
    calls = 0

    def logits(self, model, batch):
        logits = super().logits(model, batch)
        self.calls += model.training
        if self.calls == 4 and not Path("poisoned").exists():
            Path("poisoned").write_text("")
            return logits * float("inf")
        return logits
"""


def test_on_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """Exit code 1 and one line that says where and what to do; what it says can be done."""
    (tmp_path / "tasks.py").write_text(textwrap.dedent(TASK))
    monkeypatch.chdir(tmp_path)
    command = ["prune", "--model", "llava-digits", "--task", "tasks.py:Once", "--keep", "0.8", "--stages", "2"]
    command += ["--stage-steps", "3", "--final-steps", "2", "--val-examples", "30", "--strategy", "comp", "-o", "out"]
    assert main(command) == 1
    told = [line for line in capsys.readouterr().err.splitlines() if "not finite" in line]
    assert len(told) == 1 and told[0].startswith(
        "comp-edge prune: loss nan with gradient norm nan is not finite, in step 1 "
    )
    assert "of stage 2; the last checkpoint is intact" in told[0] and not Path("out").exists()
    assert main([*command, "--resume", "--lr", "1e-5"]) == 0
    assert "Traceback" not in capsys.readouterr().err
    plan = comp_edge.Plan.load("out")
    assert plan.cost.pruned <= 0.8 * plan.cost.dense
