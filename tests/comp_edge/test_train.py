"""Dense training learns, and resumes to the same weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from comp_edge import train as training
from comp_edge.errors import InputError
from comp_edge.train import train


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


@pytest.mark.slow
def test_training_learns(tiny_model: Any, tiny_task: Any, tmp_path: Path) -> None:
    batch = tiny_task.batch("train", list(range(12)))
    before = float(tiny_task.loss(tiny_model, batch))
    result = train(tiny_model, tiny_task, folder=tmp_path, steps=120, val_questions=10)
    assert float(tiny_task.loss(tiny_model, batch)) < 0.5 * before and result.loss < before
