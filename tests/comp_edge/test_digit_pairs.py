"""The data of `digit_pairs`: deterministic, disjoint between splits, every caption true of its image and of no other in
its gallery."""

from __future__ import annotations

import hashlib
import itertools
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from comp_edge.reference.processors import build_processor, config_for
from comp_edge.tasks import Task, digits, load_task
from comp_edge.tasks.digit_pairs import DigitPairs
from comp_edge.tasks.pairs import SOFTMAX, PairTask
from comp_edge.tasks.vqa import Split
from tests import families

SPLITS = ("train", "val", "test")
PINNED_CAPTIONS = [
    [0, "a blue 2, a cyan 6 and a green 1"],
    [1, "a green 1, a yellow 9, a pink 0, a cyan 3, a red 5 and a blue 1"],
    [2, "a blue 0, a red 8, a green 8, a pink 2 and a cyan 3"],
]
PINNED_IMAGES = "d111e6f7c9c6a745fc7b5e22f9b38462f9eb278acaa174e2e1ab22b016bd1583"


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    """`digit_pairs` with 40/20/20 images in galleries of 10, in a cache of its own."""
    monkeypatch.setattr(digits, "SIZES", {"train": 40, "val": 20, "test": 20})
    monkeypatch.setattr(digits, "GALLERY", 10)
    monkeypatch.setenv("COMP_EDGE_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def clip() -> tuple[Any, Any]:
    """A small CLIP at 64x64 pixels and its processor."""
    small = families.case_named("clip").model()
    corpus = [digits.caption(np.random.default_rng(i), scene(i)) for i in range(50)]
    processor = build_processor("clip", small.config, corpus, vocabulary=560)
    return type(small)(config_for(processor, small.config)).eval(), processor


def scene(seed: int) -> digits.Scene:
    rng = np.random.default_rng(seed)
    n = int(rng.integers(3, 7))
    return digits.Scene(cells=rng.permutation(16)[:n], colors=rng.permutation(6)[:n], digits=rng.integers(0, 10, n))


def told(text: str) -> list[tuple[str, int]]:
    """Colour and digit of what a caption names, in its order."""
    words = [part.split() for part in text.replace(" and ", ", ").split(", ")]
    assert all(article == "a" for article, _, _ in words)
    return [(color, int(digit)) for _, color, digit in words]


def test_a_caption_names_everything_in_any_order() -> None:
    shown = digits.Scene(cells=np.arange(3), colors=np.array([0, 2, 1]), digits=np.array([7, 3, 7]))
    rng = np.random.default_rng(0)
    captions = {digits.caption(rng, shown) for _ in range(200)}
    assert "a red 7, a blue 3 and a green 7" in captions and len(captions) == 6
    assert {frozenset(told(text)) for text in captions} == {frozenset({("red", 7), ("blue", 3), ("green", 7)})}


@pytest.mark.parametrize("split", SPLITS)
def test_captions_are_true(few: None, split: str) -> None:
    images, cells, captions = digits.generate_pairs(split)
    assert images.shape == (digits.SIZES[split], 64, 64, 3) and images.dtype == np.uint8
    for image, text in captions:
        there = {(digits.NAMES[color], int(digit)) for digit, color in cells[image] if digit < 10}
        assert set(told(text)) == there and len(told(text)) == len(there)
    shown = [row[0] for row in captions]
    assert shown == sorted(shown) and {shown.count(i) for i in range(len(images))} == {4 if split == "train" else 1}


@pytest.mark.parametrize("split", SPLITS)
def test_the_same_everywhere(few: None, split: str) -> None:
    first, second = digits.generate_pairs(split), digits.generate_pairs(split)
    assert all(np.array_equal(a, b) for a, b in zip(first[:2], second[:2], strict=True)) and first[2] == second[2]


def test_the_data_are_pinned(few: None) -> None:
    """The shipped model was trained on exactly these: whoever changes them must train anew and rename the cache key."""
    images, cells, captions = digits.generate_pairs("test")
    assert captions[:3] == PINNED_CAPTIONS
    assert hashlib.sha256(images[:5].tobytes() + cells[:5].tobytes()).hexdigest() == PINNED_IMAGES


def test_splits_differ(few: None) -> None:
    """Their images do; that their handwritten digits do is `glyph_pools`'."""
    images = {split: {image.tobytes() for image in digits.generate_pairs(split)[0]} for split in SPLITS}
    assert all(not images[a] & images[b] for a, b in itertools.combinations(SPLITS, 2))
    assert not images["test"] & {image.tobytes() for image in digits.generate("test")[0]}


def test_only_the_splits_own_digits_are_drawn(few: None, monkeypatch: pytest.MonkeyPatch) -> None:
    pools, drawn = digits.glyph_pools()[2], []
    draw = digits.draw
    monkeypatch.setattr(digits, "draw", lambda rng, g, labels, pool: drawn.append(pool) or draw(rng, g, labels, pool))
    for split in SPLITS:
        drawn.clear()
        digits.generate_pairs(split)
        assert len(drawn) >= digits.SIZES[split] and all(np.array_equal(pool, pools[split]) for pool in drawn)


def test_no_two_images_of_a_gallery_show_the_same(few: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """With scenes of which there are only twelve, galleries of ten need to draw again; across galleries they may repeat."""

    def draw(rng: np.random.Generator, *_: Any) -> tuple[np.ndarray, digits.Scene]:
        n = 3
        colors = rng.permutation(3)  # the order is no difference
        return rng.integers(0, 256, (64, 64, 3), dtype=np.uint8), digits.Scene(
            cells=rng.permutation(16)[:n], colors=colors, digits=np.where(colors == 0, rng.integers(0, 12), 3)
        )

    monkeypatch.setattr(digits, "draw", draw)
    _, _, captions = digits.generate_pairs("val")
    contents = [frozenset(told(text)) for _, text in captions]
    assert len(set(contents[:10])) == len(set(contents[10:])) == 10
    assert len(set(contents)) <= 12


def test_galleries_of_the_true_test_split() -> None:
    captions = DigitPairs(None).split("test").questions
    assert len(captions) == 1500 and digits.GALLERY == 250
    for start in range(0, 1500, 250):
        assert len({frozenset(told(text)) for _, text in captions[start : start + 250]}) == 250


def test_digit_pairs_is_a_task(few: None, clip: tuple[Any, Any]) -> None:
    model, processor = clip
    task = load_task("digit_pairs", processor)
    assert isinstance(task, Task) and isinstance(task, PairTask)
    task.pairs_per_batch, task.eval_batch = 8, 10
    batch = next(task.train_batches(0))
    assert batch["pixel_values"].shape == (8, 3, 64, 64) and batch["image_ids"].unique().numel() == 8
    assert batch["image_ids"].tolist() == [task.split("train").questions[i][0] for i in batch["pair_ids"].tolist()]
    labels = task.patch_labels(batch["image_ids"])
    assert labels.shape == (8, 16, 2)
    assert torch.isfinite(task.auxiliary_head(width=32, patches=64)(torch.randn(8, 64, 32), labels))
    assert [len(batch["pair_ids"]) for batch in task.test_batches()] == [10, 10]
    assert torch.isfinite(task.loss(model, batch)) and 0 <= task.score(model, task.val_batches()) <= 1


class Numbers(PairTask):
    """Six pairs, which `ByRemainder` tells apart by their number modulo 3."""

    def __init__(self, **options: Any) -> None:
        super().__init__(SimpleNamespace(), eval_batch=3, **options)

    comparison = SOFTMAX

    def load_split(self, split: str) -> Split:
        return Split(images=np.zeros((6, 2, 2, 3), np.uint8), questions=[[i, str(i)] for i in range(6)])

    def batch(self, split: str, pairs: list[int]) -> dict[str, torch.Tensor]:
        return {"pair_ids": torch.tensor(pairs)}


class ByRemainder(nn.Module):
    def forward(self, pair_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        embeds = torch.eye(3)[pair_ids % 3]
        return {"image_embeds": embeds, "text_embeds": embeds}


@pytest.mark.parametrize(("within_batch", "expected"), [(False, 0.5), (True, 1.0)])
def test_a_gallery_is_a_batch_where_asked_for(within_batch: bool, expected: float) -> None:
    task = Numbers(within_batch=within_batch)
    assert task.score(ByRemainder(), task.val_batches()) == expected
    with pytest.raises(ValueError, match="no batches"):
        task.score(ByRemainder(), [])
