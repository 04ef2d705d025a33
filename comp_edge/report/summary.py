"""One picture for a README: kept tokens over images, the way to the budget, tokens per layer."""

from __future__ import annotations

import textwrap
from pathlib import Path

from matplotlib.figure import Figure

from comp_edge.checkpoint import load_processor
from comp_edge.errors import InputError
from comp_edge.files import write_bytes
from comp_edge.report import pictures, theme, tokens
from comp_edge.report.facts import Facts, read_facts
from comp_edge.tasks import load_task
from comp_edge.tasks.vqa import VQATask

IMAGES = 7


def write_picture(folder: str | Path, path: str | Path, *, task: str = "digit_vqa") -> Path:
    """Draw a pruned model folder as one PNG.

    Args:
        task: a task about images and questions; its first validation images are drawn.

    Raises:
        InputError: no pruned model folder, a task of another kind, or a file that cannot be written.
    """
    facts = read_facts(folder)
    loaded = load_task(task, load_processor(facts.folder), facts.model)
    if not isinstance(loaded, VQATask):
        raise InputError(f"task {task!r} has no images and questions to draw; give digit_vqa or easy_vqa.")
    examples = tokens.run_examples(facts.model, loaded, count=IMAGES)
    with theme.style(9):
        figure = _figure(facts, examples)
        data = theme.png(figure, dpi=160)
    write_bytes(path, data)
    return Path(path)


def _figure(facts: Facts, examples: list[tokens.Example]) -> Figure:
    figure = Figure(figsize=(10, 6.9), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.06, h_pad=0.05, wspace=0.02, hspace=0.02)
    top, bottom = figure.subfigures(2, 1, height_ratios=(4.2, 2.7), hspace=0.04)
    grid = top.subplots(3, len(examples), squeeze=False)
    for column, example in zip(grid.T, examples, strict=True):
        fate = example.fate
        for axes, patches in zip(column, (None, fate.seen, fate.read), strict=True):
            image = example.image if patches is None else tokens.veil(example.image, patches, side=example.side)
            axes.imshow(image, interpolation="nearest")
            axes.set_xticks([])
            axes.set_yticks([])
            axes.spines[:].set_visible(False)
        column[0].set_title(textwrap.fill(f"{example.question}?", 16), fontsize=8, loc="center", pad=4)
        right = example.answer == example.truth
        answer = example.answer if right else f"{example.answer or 'nothing'}\n(truth: {example.truth})"
        column[2].set_xlabel(answer, color=theme.color("good" if right else "bad"))
    for axes, text in zip(grid[:, 0], ("image", "vision keeps", "language\nstill reads"), strict=True):
        axes.set_ylabel(text, rotation=0, ha="right", va="center", color=theme.color("muted"))
    scores, macs, counts = bottom.subplots(1, 3, width_ratios=(1, 1, 1.15))
    pictures.draw_scores(scores, facts)
    pictures.draw_macs(macs, facts)
    for mode in facts.modes:
        macs.scatter([], [], s=26, color=theme.color(mode), label=mode.replace("_", " "))
    macs.legend(loc="upper right", frameon=False, fontsize=8, handletextpad=0.2, borderaxespad=0)
    pictures.draw_tokens(counts, facts)
    counts.set_title("tokens per layer", color=theme.color("ink"))
    return figure
