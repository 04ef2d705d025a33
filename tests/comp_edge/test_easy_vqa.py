"""`easy_vqa`: its splits, and which patches show what."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from comp_edge.tasks.easy_vqa import BACKGROUND, SHAPES, UNKNOWN, EasyVQA, _shape
from comp_edge.tasks.vqa import Split

SPLITS = ("train", "val", "test")
# How much of its bounding box a shape fills.
FILLS = {"circle": (0.75, 0.95), "rectangle": (1.0, 1.0), "triangle": (0.5, 0.72)}


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> EasyVQA:
    """Reading the package's images takes a few seconds."""
    pytest.importorskip("easy_vqa")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COMP_EDGE_CACHE", str(tmp_path_factory.mktemp("easy")))
        task = EasyVQA(None)
        for split in SPLITS:
            task.split(split)
        return task


@pytest.fixture(scope="module")
def easy(task: EasyVQA) -> dict[str, Split]:
    return {split: task.split(split) for split in SPLITS}


@pytest.mark.slow
def test_validation_images_are_held_out(easy: dict[str, Split]) -> None:
    import easy_vqa

    assert [len(easy[split].images) for split in SPLITS] == [3400, 600, 1000]
    paths = easy_vqa.get_train_image_paths()
    texts, answers, ids = easy_vqa.get_train_questions()
    asked = {split: sum(len(group) for group in easy[split].by_image) for split in SPLITS}
    assert asked["train"] + asked["val"] == len(texts) and len(set(ids)) == len(paths) == 4000
    assert asked["test"] == len(easy_vqa.get_test_questions()[0])
    assert sum(asked.values()) == 48_248
    # Every image asks its own questions: no two share both picture and questions across the splits.
    fingerprints = {
        split: {
            (data.images[i].tobytes(), tuple(sorted(tuple(data.questions[q][1:3]) for q in group)))
            for i, group in enumerate(data.by_image)
        }
        for split, data in easy.items()
    }
    assert not fingerprints["train"] & fingerprints["val"]
    assert not fingerprints["test"] & (fingerprints["train"] | fingerprints["val"])


@pytest.mark.slow
def test_pixels_are_not_shared(easy: dict[str, Split]) -> None:
    pixels = {split: {image.tobytes() for image in easy[split].images} for split in SPLITS}
    assert not pixels["train"] & pixels["val"]
    assert not pixels["test"] & (pixels["train"] | pixels["val"])


@pytest.mark.slow
def test_questions(easy: dict[str, Split]) -> None:
    for data in easy.values():
        assert data.images.shape[1:] == (64, 64, 3) and data.images.dtype == np.uint8
        assert all(group for group in data.by_image)
        assert not any("?" in text or text != text.strip() for _, text, _, _ in data.questions)
        assert [q[0] for q in data.questions] == sorted(q[0] for q in data.questions)
        assert {"yes", "no"} < {q[2] for q in data.questions}


# ---- the auxiliary labels


@pytest.mark.slow
@pytest.mark.parametrize("split", SPLITS)
def test_what_pixels_show_has_the_form_of_what_is_said(task: EasyVQA, split: str) -> None:
    """The shape is read from questions and answers, the pixels from the image: as forms they agree."""
    shapes = task.split(split).extra["shapes"]
    labels = task.patch_labels(torch.arange(len(shapes)), split).numpy()
    assert labels.shape == (len(shapes), 64, 64) and (shapes == UNKNOWN).mean() < 0.08
    whole = 0
    for shape, pixels in zip(shapes.tolist(), labels, strict=True):
        if shape == UNKNOWN:
            assert (pixels == UNKNOWN).all()
            continue
        assert set(np.unique(pixels).tolist()) == {BACKGROUND, shape}
        rows, columns = np.nonzero(pixels)
        if min(rows.min(), columns.min()) == 0 or max(rows.max(), columns.max()) == 63:
            continue  # cut off at the border
        box = (np.ptp(rows) + 1) * (np.ptp(columns) + 1)
        least, most = FILLS[SHAPES[shape - 1]]
        assert least <= len(rows) / box <= most
        whole += 1
    assert whole > 0.7 * len(shapes)


@pytest.mark.parametrize(
    ("asked", "shape"),
    [
        ([("what shape is in the image", "circle")], "circle"),
        ([("what is the color of the triangle", "red")], "triangle"),
        ([("is a rectangle present", "yes")], "rectangle"),
        ([("is there not a rectangle", "no")], "rectangle"),
        ([("is no circle present", "yes"), ("does the image contain a triangle", "no")], "rectangle"),
        ([("is there a circle", "no")], None),
        ([("is there a red shape", "yes"), ("what color is the shape", "red")], None),
        ([], None),
    ],
)
def test_the_shape_that_questions_tell(asked: list[tuple[str, str]], shape: str | None) -> None:
    assert _shape(asked) == (UNKNOWN if shape is None else 1 + SHAPES.index(shape))


def test_a_patch_shows_what_any_of_it_does() -> None:
    """The loss is nothing only for who names the shape in every patch that has a pixel of it; no unknown image counts."""
    head = EasyVQA(None).auxiliary_head(width=4, patches=16)
    with torch.no_grad():
        head.linear.weight.copy_(torch.eye(4))
        head.linear.bias.zero_()
    labels = torch.zeros(2, 8, 8, dtype=torch.int64)
    labels[0, 2, 3] = 2  # the patch in row 1, column 1 of a 4x4 grid
    labels[1] = UNKNOWN
    features = torch.zeros(2, 16, 4)
    features[:, :, BACKGROUND] = 50.0
    assert head(features, labels) > 5
    features[0, 5] = torch.tensor([0.0, 0.0, 50.0, 0.0])
    assert head(features, labels) < 1e-6
    features[1] = torch.randn(16, 4)
    assert head(features, labels) < 1e-6
    features.requires_grad_()
    nothing = head(features[1:], labels[1:])
    nothing.backward()
    assert nothing == 0 and not features.grad.any()
