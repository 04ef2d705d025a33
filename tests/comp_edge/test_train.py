"""Dense training learns, and resumes to the same weights."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from comp_edge import train as training
from comp_edge.errors import InputError
from comp_edge.families import family_of
from comp_edge.tasks.folding import distinct_images
from comp_edge.tasks.packing import take_rows
from comp_edge.train import train
from tests import tiny


class _Stop(Exception):
    """Stands for a kill."""


def run(model: Any, task: Any, folder: Path, **options: Any) -> Any:
    return train(model, task, folder=folder, steps=9, val_questions=10, **options)


def test_resumed_equals_uninterrupted(
    make_model: Any, tiny_task: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "CHUNK", 4)
    whole = make_model()
    assert run(whole, tiny_task, tmp_path / "a").steps == 9

    def stop(step: int, loss: float) -> None:
        if step == 6:
            raise _Stop

    with pytest.raises(_Stop):
        run(make_model(), tiny_task, tmp_path / "b", on_step=stop)
    resumed = make_model()
    run(resumed, tiny_task, tmp_path / "b", resume=True)
    assert all(
        torch.equal(a, b) for a, b in zip(whole.state_dict().values(), resumed.state_dict().values(), strict=True)
    )


def test_nothing_to_resume(tiny_model: Any, tiny_task: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is nothing to resume"):
        run(tiny_model, tiny_task, tmp_path, resume=True)


class Lessons(tiny.TinyVQA):
    """Teaches the vision tower something about patches; keeps what it was given to judge."""

    def __init__(self, processor: Any, *, apart: bool = False) -> None:
        super().__init__(processor)
        self.apart, self.judged, self.model = apart, [], None

    def auxiliary_head(self, width: int, patches: int) -> torch.nn.Module:
        assert patches == tiny.IMAGE_TOKENS
        return _Lesson(width, self)

    def patch_labels(self, image_ids: torch.Tensor) -> torch.Tensor:
        return torch.arange(tiny.IMAGES["train"])[image_ids]  # looked up on the CPU, as a task's data are

    def logits(self, model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        if self.apart:  # as a task that knows nothing of sharing: the model's own forward, image by question
            ids = torch.arange(len(batch["image_ids"]))
            return super().logits(model, batch | {"image_ids": ids})
        return super().logits(model, batch)


class _Lesson(torch.nn.Module):
    def __init__(self, width: int, task: Lessons) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(width, 2)
        self.judged = task.judged

    def forward(self, features: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        self.judged.append((labels, features.detach().clone()))
        return self.linear(features).square().mean()


@pytest.mark.parametrize("apart", [False, True], ids=["shared", "apart"])
def test_the_auxiliary_loss_sees_each_image_once(make_model: Any, processor: Any, tmp_path: Path, apart: bool) -> None:
    """Whether the task encodes an image once for all questions or not: the patches of the distinct images, in order."""
    task, model, runs = Lessons(processor, apart=apart), make_model(), []
    expected = []
    for batch in itertools.islice(task.train_batches(0), 2):
        first, _ = distinct_images(batch["image_ids"])
        expected.append((batch["image_ids"][first], take_rows(batch, first)))
    with torch.no_grad():
        before = training._patch_features(model, expected[0][1])
    tower = family_of(model).streams(model)["vision"].root
    tower.register_forward_hook(lambda _, __, output: runs.append(len(output.last_hidden_state)))
    train(model, task, folder=tmp_path, steps=2, val_questions=10)
    assert [labels.tolist() for labels, _ in task.judged] == [ids.tolist() for ids, _ in expected]
    assert torch.allclose(task.judged[0][1], before, atol=1e-6)
    # The first is for the width of the head, the last one scores.
    assert runs[1:-1] == ([4] * 2 if not apart else [12, 4] * 2)


@pytest.mark.slow
def test_training_learns(tiny_model: Any, tiny_task: Any, tmp_path: Path) -> None:
    batch = tiny_task.batch("train", list(range(12)))
    before = float(tiny_task.loss(tiny_model, batch))
    result = train(tiny_model, tiny_task, folder=tmp_path, steps=120, val_questions=10)
    assert float(tiny_task.loss(tiny_model, batch)) < 0.5 * before and result.loss < before
