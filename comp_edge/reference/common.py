"""What the reference models share: the size of their images, the texts that they read, and weights that train fast."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from comp_edge.tasks import task_class

SIDE, PATCH = 64, 8
WIDTH, HEADS = 96, 6
MOST_TEXTS = 20_000  # of a task: its questions are of few kinds, and repeat


def questions_and_answers(tasks: Iterable[str] = ("digit_vqa", "easy_vqa")) -> list[str]:
    """ "question answer" of training questions of the built-in tasks: one vocabulary serves all of them."""
    texts: list[str] = []
    for name in tasks:
        # The questions are all that is needed here, so no processor is given.
        for _, question, answer, _ in task_class(name)(None).split("train").questions[:MOST_TEXTS]:
            texts.append(f"{question} {answer}")
    return texts


def captions() -> list[str]:
    """Captions of `digit_pairs`."""
    return [row[1] for row in task_class("digit_pairs")(None).split("train").questions[:MOST_TEXTS]]


@torch.no_grad()
def widen(model: Any, *, matrices: str, tables: str) -> None:
    """Draw initial weights anew, in place: transformers' small variances train slowly at a width of a hundred.

    Args:
        matrices: part of the names of the weights whose variance becomes 0.49 / fan-in.
        tables: part of the names of the embeddings whose standard deviation becomes 0.1.
    """
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2 and matrices in name:
            torch.nn.init.trunc_normal_(parameter, std=0.7 * parameter.shape[1] ** -0.5)
        elif tables in name:
            torch.nn.init.normal_(parameter, std=0.1)
