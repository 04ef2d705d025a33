"""The images of `digit_vqa` and `digit_pairs`, a 4x4 grid with three to six coloured handwritten digits; what is said of
them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

GRID = 4
CELL = 16
SIDE = GRID * CELL
COLORS = {
    "red": (230, 40, 40),
    "green": (40, 200, 40),
    "blue": (60, 80, 240),
    "yellow": (230, 220, 40),
    "pink": (240, 110, 200),
    "cyan": (40, 220, 220),
}
NAMES = tuple(COLORS)
KINDS = ("digit_of_color", "color_of_digit", "exists", "count", "color_and_digit_exists")
SIZES = {"train": 12_000, "val": 1_500, "test": 1_500}
QUESTIONS_PER_IMAGE = {"train": 8, "val": 5, "test": 5}
CAPTIONS_PER_IMAGE = {"train": 4, "val": 1, "test": 1}
GALLERY = 250  # images in a row of which no two show the same
_SEEDS = {"train": 11, "val": 12, "test": 13}
_PAIR_SEEDS = {"train": 21, "val": 22, "test": 23}


@dataclass(frozen=True)
class Scene:
    """What one image shows: cell index, colour index and digit of each object."""

    cells: np.ndarray
    colors: np.ndarray
    digits: np.ndarray

    @property
    def content(self) -> frozenset[tuple[int, int]]:
        """Colour and digit of each object, wherever it lies: all that a caption tells."""
        return frozenset(zip(self.colors.tolist(), self.digits.tolist(), strict=True))


def glyph_pools() -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    """The handwritten digits of scikit-learn and which of them each split may use (disjoint).

    Returns:
        glyphs [1797, 16, 16] in 0..1, labels [1797], indices per split.
    """
    from sklearn.datasets import load_digits

    data = load_digits()
    glyphs = np.kron(data.images / 16.0, np.ones((2, 2))).astype(np.float32)
    order = np.random.default_rng(0).permutation(len(glyphs))
    return glyphs, data.target, {"train": order[:1300], "val": order[1300:1550], "test": order[1550:]}


def draw(
    rng: np.random.Generator, glyphs: np.ndarray, labels: np.ndarray, pool: np.ndarray
) -> tuple[np.ndarray, Scene]:
    """One image [64, 64, 3] uint8 and its scene."""
    image = rng.uniform(0, 70) + rng.normal(0, 12, (SIDE, SIDE, 3)).astype(np.float32)
    n = int(rng.integers(3, 7))
    cells = rng.choice(GRID * GRID, n, replace=False)
    colors = rng.permutation(len(NAMES))[:n]
    sources = rng.choice(pool, n)
    for cell, color, source in zip(cells, colors, sources, strict=True):
        top, left = cell // GRID * CELL, cell % GRID * CELL
        ink = glyphs[source][..., None]
        patch = image[top : top + CELL, left : left + CELL]
        image[top : top + CELL, left : left + CELL] = patch * (1 - ink) + np.array(COLORS[NAMES[color]]) * ink
    return image.clip(0, 255).astype(np.uint8), Scene(cells=cells, colors=colors, digits=labels[sources])


def ask(rng: np.random.Generator, kind: str, scene: Scene) -> tuple[str, str]:
    """A question of the given kind about a scene, and its answer.

    A kind that the scene does not admit (no digit occurs once, for `color_of_digit`) becomes `digit_of_color`.
    """
    digits, colors = scene.digits, [NAMES[c] for c in scene.colors]
    if kind == "color_of_digit":
        unique = [i for i, d in enumerate(digits) if (digits == d).sum() == 1]
        if unique:
            i = rng.choice(unique)
            return f"what color is the {digits[i]}", colors[i]
        kind = "digit_of_color"
    if kind == "digit_of_color":
        i = rng.integers(len(digits))
        return f"what digit is {colors[i]}", str(digits[i])
    if kind == "count":
        return "how many digits are there", str(len(digits))
    yes = rng.random() < 0.5
    if kind == "exists":
        choices = [d for d in range(10) if (d in digits) == yes]
        return f"is there a {rng.choice(choices)}", "yes" if yes else "no"
    if kind == "color_and_digit_exists":
        i = int(rng.integers(len(digits)))
        if yes:
            return f"is there a {colors[i]} {digits[i]}", "yes"
        # The hard negative: both the colour and the digit are in the image, but not together.
        others = [int(d) for d in digits if d != digits[i]] or [int(digits[i] + 1) % 10]
        return f"is there a {colors[i]} {rng.choice(others)}", "no"
    raise ValueError(f"unknown question kind {kind!r}")


def generate(split: str) -> tuple[np.ndarray, np.ndarray, list[list]]:
    """All images and questions of a split, the same on every machine.

    Returns:
        images [n, 64, 64, 3] uint8; cells [n, 16, 2] int8, digit (10 = none) and colour (6 = none) of every grid cell;
        questions as [image index, question, answer, kind].
    """
    rng = np.random.default_rng(_SEEDS[split])
    glyphs, labels, pools = glyph_pools()
    n, per_image = SIZES[split], QUESTIONS_PER_IMAGE[split]
    images = np.zeros((n, SIDE, SIDE, 3), np.uint8)
    cells = np.tile(np.array([10, len(NAMES)], np.int8), (n, GRID * GRID, 1))
    questions = []
    for i in range(n):
        images[i], scene = draw(rng, glyphs, labels, pools[split])
        cells[i, scene.cells, 0] = scene.digits
        cells[i, scene.cells, 1] = scene.colors
        # Every image is asked each kind once; what remains is drawn.
        kinds = list(KINDS) + list(rng.choice(KINDS, max(per_image - len(KINDS), 0)))
        for kind in kinds[:per_image]:
            question, answer = ask(rng, kind, scene)
            # `ask` falls back to another kind where a scene does not admit the wanted one.
            asked = "digit_of_color" if question.startswith("what digit") else kind
            questions.append([i, question, answer, KINDS.index(asked)])
    return images, cells, questions


def caption(rng: np.random.Generator, scene: Scene) -> str:
    """All objects of a scene in a random order, as "a red 7, a blue 3 and a green 1"."""
    order = rng.permutation(len(scene.digits))
    *others, last = (f"a {NAMES[scene.colors[i]]} {scene.digits[i]}" for i in order)
    return f"{', '.join(others)} and {last}"


def generate_pairs(split: str) -> tuple[np.ndarray, np.ndarray, list[list]]:
    """All images and captions of a split, the same on every machine.

    The images `GALLERY * i` to `GALLERY * (i + 1) - 1` show different things: a scene that one of them shows already is
    drawn again. So no caption of theirs is true of another, and captions are distinct whatever their order.

    Returns:
        images [n, 64, 64, 3] uint8; cells [n, 16, 2] int8 as `generate`; captions as [image index, caption].
    """
    rng = np.random.default_rng(_PAIR_SEEDS[split])
    glyphs, labels, pools = glyph_pools()
    n = SIZES[split]
    images = np.zeros((n, SIDE, SIDE, 3), np.uint8)
    cells = np.tile(np.array([10, len(NAMES)], np.int8), (n, GRID * GRID, 1))
    captions, shown = [], set()
    for i in range(n):
        if i % GALLERY == 0:
            shown = set()
        images[i], scene = draw(rng, glyphs, labels, pools[split])
        while scene.content in shown:
            images[i], scene = draw(rng, glyphs, labels, pools[split])
        shown.add(scene.content)
        cells[i, scene.cells, 0] = scene.digits
        cells[i, scene.cells, 1] = scene.colors
        captions += [[i, caption(rng, scene)] for _ in range(CAPTIONS_PER_IMAGE[split])]
    return images, cells, captions
