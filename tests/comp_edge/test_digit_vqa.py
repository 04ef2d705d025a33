"""The data of `digit_vqa`: deterministic, disjoint between splits, and every answer right."""

from __future__ import annotations

import hashlib
import itertools

import numpy as np
import pytest
import torch

from comp_edge.tasks import Task, digits
from comp_edge.tasks.digit_vqa import DigitVQA

SPLITS = ("train", "val", "test")
PINNED_QUESTIONS = [
    [0, "what digit is red", "3", 0],
    [0, "what color is the 5", "pink", 1],
    [0, "is there a 4", "yes", 2],
    [0, "how many digits are there", "5", 3],
    [0, "is there a pink 5", "yes", 4],
]
PINNED_IMAGES = "35bda036131d60ddbaa3c80213ee8af8a94e4f09f0ea57f5d4836a6aeef41b97"


@pytest.fixture
def few(monkeypatch, tmp_path):
    """`digit_vqa` with 40/20/20 images, in a cache of its own: other tests must not find the reduced splits."""
    monkeypatch.setattr(digits, "SIZES", {"train": 40, "val": 20, "test": 20})
    monkeypatch.setenv("COMP_EDGE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_the_documented_sizes():
    assert digits.SIZES == {"train": 12_000, "val": 1_500, "test": 1_500}


def test_sources_are_disjoint():
    glyphs, labels, pools = digits.glyph_pools()
    assert glyphs.shape == (1797, 16, 16) and 0 <= glyphs.min() and glyphs.max() == 1
    together = np.concatenate([pools[split] for split in SPLITS])
    assert sorted(together) == list(range(1797))  # disjoint, and all of them used
    for split in SPLITS:
        assert set(labels[pools[split]]) == set(range(10))


@pytest.mark.parametrize("split", SPLITS)
def test_only_the_splits_own_digits_are_drawn(few, split):
    """Each digit in an image, its colour divided out, is a glyph of the split's pool and of no other."""
    glyphs, _, pools = digits.glyph_pools()
    images, cells, _ = digits.generate(split)
    for image, objects in zip(images[:5], cells[:5], strict=True):
        for cell, (digit, color) in enumerate(objects):
            if digit == 10:
                continue
            top, left = cell // 4 * 16, cell % 4 * 16
            patch = image[top : top + 16, left : left + 16].astype(float)
            ink = digits.COLORS[digits.NAMES[color]]
            channel = int(np.argmax(ink))
            candidates = np.concatenate([pools[s] for s in SPLITS])
            shapes = glyphs[candidates].reshape(len(candidates), -1)
            seen = patch[..., channel].ravel()
            # The background is unknown (noise around one level): regress it out, and compare what is left.
            drawn = shapes * (ink[channel] - 35) + 35
            best = candidates[np.abs(drawn - seen).mean(1).argmin()]
            assert best in pools[split]


@pytest.mark.parametrize("split", SPLITS)
def test_the_same_everywhere(few, split):
    first, second = digits.generate(split), digits.generate(split)
    assert all(np.array_equal(a, b) for a, b in zip(first[:2], second[:2], strict=True)) and first[2] == second[2]


def test_the_data_are_pinned(few):
    """The shipped model was trained on exactly these: whoever changes them must train anew and rename the cache key."""
    images, cells, questions = digits.generate("test")
    assert questions[:5] == PINNED_QUESTIONS
    digest = hashlib.sha256(images[:5].tobytes() + cells[:5].tobytes()).hexdigest()
    assert digest == PINNED_IMAGES


def test_splits_differ(few):
    images = {split: {image.tobytes() for image in digits.generate(split)[0]} for split in SPLITS}
    assert all(not images[a] & images[b] for a, b in itertools.combinations(SPLITS, 2))
    assert [len(images[split]) for split in SPLITS] == [40, 20, 20]


def answer(objects: list[tuple[int, str]], question: str) -> str:
    """The answer from the scene alone."""
    colors = {color: digit for digit, color in objects}
    words = question.split()
    if question.startswith("what digit is"):
        return str(colors[words[3]])
    if question.startswith("what color is the"):
        found = [color for digit, color in objects if digit == int(words[4])]
        assert len(found) == 1, "the question must have one answer"
        return found[0]
    if question == "how many digits are there":
        return str(len(objects))
    assert question.startswith("is there a")
    if len(words) == 4:
        return "yes" if any(digit == int(words[3]) for digit, _ in objects) else "no"
    return "yes" if (int(words[4]), words[3]) in objects else "no"


def objects_of(cells: np.ndarray) -> list[tuple[int, str]]:
    return [(int(digit), digits.NAMES[color]) for digit, color in cells if digit < 10]


def kind_of(question: str) -> str:
    if question.startswith("is there a"):
        return "exists" if len(question.split()) == 4 else "color_and_digit_exists"
    starts = {"what digit": "digit_of_color", "what color": "color_of_digit", "how many": "count"}
    return next(kind for start, kind in starts.items() if question.startswith(start))


@pytest.mark.parametrize("split", SPLITS)
def test_every_answer_is_right(few, split):
    images, cells, questions = digits.generate(split)
    assert images.shape == (digits.SIZES[split], 64, 64, 3) and images.dtype == np.uint8
    for image, question, given, _ in questions:
        objects = objects_of(cells[image])
        assert 3 <= len(objects) <= 6
        assert len({color for _, color in objects}) == len(objects)
        assert answer(objects, question) == given, (question, objects)
    asked = [question[0] for question in questions]
    assert asked == sorted(asked) and set(asked) == set(range(len(images)))
    assert {asked.count(i) for i in range(len(images))} == {digits.QUESTIONS_PER_IMAGE[split]}
    assert {kind_of(question[1]) for question in questions} == set(digits.KINDS)
    assert {question[2] for question in questions if question[1].startswith("is there")} == {"yes", "no"}


def test_questions_are_labelled_with_the_kind_that_was_asked(few, monkeypatch):
    """In a scene where no digit occurs once, another question stands in for `color_of_digit`."""
    pairs = digits.Scene(cells=np.arange(4), colors=np.arange(4), digits=np.array([3, 3, 5, 5]))
    monkeypatch.setattr(digits, "draw", lambda *_: (np.zeros((64, 64, 3), np.uint8), pairs))
    wrong = [q for q in digits.generate("val")[2] if digits.KINDS[q[3]] != kind_of(q[1])]
    assert not wrong, wrong[:3]


def test_unknown_kind():
    scene = digits.Scene(cells=np.array([0]), colors=np.array([0]), digits=np.array([3]))
    with pytest.raises(ValueError, match="'riddle'"):
        digits.ask(np.random.default_rng(0), "riddle", scene)


def test_a_no_is_hard():
    """Colour and digit of a wrong pair are both in the image, where the image has two different digits."""
    rng = np.random.default_rng(0)
    scene = digits.Scene(cells=np.arange(3), colors=np.arange(3), digits=np.array([3, 3, 5]))
    asked = {digits.ask(rng, "color_and_digit_exists", scene) for _ in range(200)}
    no = {question.removeprefix("is there a ") for question, reply in asked if reply == "no"}
    assert no == {"red 5", "green 5", "blue 3"}


def test_digit_vqa_is_a_task(few, processor):
    task = DigitVQA(processor, images_per_batch=2, questions_per_image=3)
    assert isinstance(task, Task)
    assert sorted(path.name for path in few.glob("*")) == []
    batch = next(task.train_batches(0))
    assert batch["pixel_values"].shape == (6, 3, 64, 64)
    assert [path.name for path in few.glob("*train*")] != []
    labels = task.patch_labels(batch["image_ids"])
    assert labels.shape == (6, 16, 2) and labels.dtype == torch.int64
    for row, question in zip(labels.numpy(), batch["question_ids"].tolist(), strict=True):
        _, text, given, _ = task.split("train").questions[question]
        assert answer(objects_of(row), text) == given
    head = task.auxiliary_head(width=32, patches=16)
    assert torch.isfinite(head(torch.randn(6, 16, 32), labels))


@pytest.mark.parametrize("patches", [4, 16, 64])
def test_patches_know_their_cell(few, processor, patches):
    """A patch is judged by the grid cell that it lies in, whatever the patch size."""
    head = DigitVQA(processor).auxiliary_head(width=1, patches=patches)
    side = int(patches**0.5)
    for patch, cell in enumerate(head.cell.tolist()):
        row, column = (patch // side) * 4 // side, (patch % side) * 4 // side
        assert cell == row * 4 + column
