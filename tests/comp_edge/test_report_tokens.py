"""Which tokens the report draws: following them through both streams, and the geometry of patches."""

from __future__ import annotations

import base64
import io

import numpy as np
import pytest
import torch
from PIL import Image

from comp_edge.report import tokens
from comp_edge.tasks.vqa import Split


def test_fate_follows_tokens_through_both_streams() -> None:
    # Nine patches behind a class token; vision keeps patches 1, 4 and 8; language drops the second of these and a word.
    vision = torch.zeros(10, dtype=torch.bool)
    vision[[0, 2, 5, 9]] = True
    ids = torch.tensor([0, 0, 7, *[3] * 9, 8, 9])
    mask = torch.tensor([0, 0, *[1] * 12])
    #                        pads          head  image               tail
    language = torch.tensor([False, False, True, True, False, True, False, True])
    fate = tokens.fate_of(ids, mask, vision, language, image_token=3)
    assert fate.seen == (1, 4, 8)
    assert fate.read == (1, 8)
    assert fate.text == ((7, True), (8, False), (9, True))


def test_fate_when_the_class_token_is_delivered_too() -> None:
    vision = torch.tensor([True, False, True, True, False])
    ids = torch.tensor([7, *[3] * 5, 8])
    fate = tokens.fate_of(
        ids, torch.ones(7), vision, torch.tensor([True, True, False, True, True]), image_token=3, delivered_class=True
    )
    assert fate.seen == (1, 2) and fate.read == (2,)


def test_fate_refuses_a_sequence_of_another_length() -> None:
    with pytest.raises(ValueError, match="ran on 3 tokens, the prompt has 5"):
        tokens.fate_of(
            torch.tensor([7, 3, 3, 3, 3]), torch.ones(5), torch.ones(5) > 0, torch.ones(3) > 0, image_token=3
        )


@pytest.mark.parametrize(("side", "shape"), [(2, (8, 8)), (4, (64, 64)), (3, (10, 11))])
def test_patch_mask_covers_each_pixel_once(side: int, shape: tuple[int, int]) -> None:
    masks = [tokens.patch_mask([p], side=side, shape=shape) for p in range(side * side)]
    assert (np.sum(masks, axis=0) == 1).all()
    row, column = np.argwhere(masks[side])[0]  # the first patch of the second row
    assert column == 0 and row == -(-shape[0] // side)


def test_veil_leaves_kept_patches_untouched() -> None:
    image = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    drawn = tokens.veil(image, [1, 2], side=2)
    assert (drawn[:4, 4:] == image[:4, 4:]).all() and (drawn[4:, :4] == image[4:, :4]).all()
    assert (np.abs(drawn[:4, :4].astype(int) - tokens.VEIL) <= 36).all()
    assert (np.abs(drawn[4:, 4:].astype(int) - tokens.VEIL) <= 36).all()
    uri = tokens.data_uri(drawn)
    decoded = Image.open(io.BytesIO(base64.b64decode(uri.removeprefix("data:image/png;base64,"))))
    assert (np.asarray(decoded) == drawn).all()


def test_control_characters_become_visible() -> None:
    assert tokens.printable("yes\x10\x00 no\n") == "yes\ufffd\ufffd no\ufffd"


def test_questions_go_round_the_kinds_without_picking() -> None:
    images = np.zeros((4, 2, 2, 3), dtype=np.uint8)
    rows = [[0, "a", "1", "x"], [0, "b", "1", "y"], [1, "c", "1", "x"], [1, "d", "1", "y"], [3, "e", "1", "y"]]
    assert tokens.choose_questions(Split(images, rows), 3) == [0, 3, 4]
    assert tokens.choose_questions(Split(images, [row[:3] for row in rows]), 2) == [0, 2]
    assert tokens.choose_questions(Split(images, []), 2) == []
