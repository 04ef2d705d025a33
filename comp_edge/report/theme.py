"""Colours, and matplotlib figures as inline SVG that follows the page's light or dark scheme."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager

import matplotlib
from markupsafe import Markup
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

# name -> colour on a light page, colour on a dark one. A stream is a hue; its parameters are the deep shade, its tokens the
# light one. Light values are unique: figures are drawn with them, and `svg` turns each into its CSS variable.
PALETTE = {
    "paper": ("#fdfcfa", "#16181b"),
    "card": ("#f4f2ee", "#1f2226"),
    "ink": ("#20242a", "#e6e4df"),
    "muted": ("#6a6d72", "#a0a2a6"),
    "line": ("#dedbd5", "#363a40"),
    "dense": ("#b3b1ac", "#6b6f75"),
    "other": ("#8a8780", "#8b8d90"),
    "vision-params": ("#1d4f80", "#4b90d0"),
    "vision-tokens": ("#5b9bd1", "#9fcdf3"),
    "language-params": ("#9c4310", "#dc7a38"),
    "language-tokens": ("#e2903f", "#f5c38c"),
    "cross-params": ("#5b3a8c", "#9b7bd0"),
    "cross-tokens": ("#9f83cc", "#cdbbeb"),
    "params": ("#3f4449", "#c9cbce"),  # of all streams together, as the baselines have them
    "tokens": ("#93989d", "#8d9196"),
    "good": ("#2d7a46", "#6cc088"),
    "bad": ("#b3261e", "#f0847c"),
}
PARTS = {"connector": "other", "head": "ink"}  # parts of a model that are no stream
PHONE_WIDTH = 5.1  # inches; with 10 pt text a figure of this width is still readable on a phone


def color(name: str) -> str:
    """The light colour of a palette name, or of a mode or stream (`vision_params`, `vision`)."""
    return PALETTE[role(name)][0]


def role(name: str) -> str:
    """The palette name for a palette name, mode, stream or part of a model; `other` where there is none."""
    name = name.replace("_", "-")
    for candidate in (name, f"{name}-params", PARTS.get(name)):
        if candidate in PALETTE:
            return candidate
    return "other"


@contextmanager
def style(size: float = 10) -> Iterator[None]:
    """matplotlib settings for all of our figures: few lines, text that is never taken for formulas."""
    ink, muted, line = color("ink"), color("muted"), color("line")
    settings = {
        "font.family": "sans-serif", "font.size": size, "text.parse_math": False, "text.color": ink,
        "axes.edgecolor": line, "axes.labelcolor": muted, "axes.linewidth": 0.8, "axes.titlesize": size,
        "axes.spines.top": False, "axes.spines.right": False, "axes.titlelocation": "left", "axes.titlepad": 8,
        "xtick.color": line, "ytick.color": line, "xtick.labelcolor": muted, "ytick.labelcolor": muted,
        "grid.color": line, "grid.linewidth": 0.6, "axes.axisbelow": True, "figure.facecolor": "none",
        "axes.facecolor": "none", "svg.fonttype": "none", "svg.hashsalt": "comp-edge",
    }  # fmt: skip
    with matplotlib.rc_context(settings):
        yield


def svg(figure: Figure, *, label: str) -> Markup:
    """A figure as inline SVG in the page's colours; the same bytes for the same figure.

    Args:
        label: what a screen reader says.
    """
    buffer = io.StringIO()
    FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    # Inside HTML the namespaces are implied, and matplotlib's style sheet would apply to the whole page.
    text = re.sub(r"<metadata>.*?</metadata>|<style\b.*?</style>|\sxmlns(:\w+)?=\"[^\"]*\"", "", text, flags=re.S)
    head, body = text.split(">", 1)
    view = re.search(r'viewBox="[^"]*"', head).group(0)
    for name, (light, _) in PALETTE.items():
        body = body.replace(light, f"var(--{name})")
    return Markup('<svg role="img" aria-label="{}" {}>').format(label, Markup(view)) + Markup(body.strip())


def png(figure: Figure, *, dpi: int) -> bytes:
    """A figure as PNG on the light page's colour."""
    buffer = io.BytesIO()
    FigureCanvasAgg(figure)
    figure.savefig(buffer, format="png", dpi=dpi, facecolor=color("paper"))
    return buffer.getvalue()
