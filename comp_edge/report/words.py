"""Numbers as a reader wants them."""

from __future__ import annotations

import math

TIMES, MINUS, DASH = "\u00d7", "\u2212", "\u2013"


def signed(text: str) -> str:
    """A formatted number with a real minus sign."""
    return text.replace("-", MINUS)


def amount(value: float, unit: str = "") -> str:
    """Three digits and a decimal prefix: 85.7 M, 1.30 G."""
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= factor:
            scaled = value / factor
            digits = 2 if scaled < 10 else 1 if scaled < 100 else 0
            return f"{scaled:.{digits}f} {prefix}{unit}"
    return f"{value:.0f} {unit}".strip()


def milliseconds(value: float, give_or_take: float | None = None) -> str:
    """Three digits, and no more than a clock can tell: 0.042 ms, 5.13 \u00b1 0.21 ms, 48.2 ms, 1234 ms."""
    digits = 3 if value < 1 else 2 if value < 10 else 1 if value < 100 else 0
    off = "" if give_or_take is None else f" \u00b1 {give_or_take:.{digits}f}"
    return f"{value:.{digits}f}{off} ms"


def ending(text: str, most: int) -> str:
    """The end of a text that is too long, which tells more of a path than its beginning."""
    return text if len(text) <= most else f"\u2026{text[1 - most :]}"


def percent(share: float, digits: int = 1) -> str:
    """A share of one as percent."""
    return signed(f"{100 * share:.{digits}f}") + " %"


def score(value: float) -> str:
    """A score, whatever its scale."""
    return signed(f"{value:.3f}")


def change(dense: float, pruned: float) -> str:
    """The change of a score, with its sign."""
    rounded = round(pruned - dense, 3)
    return "unchanged" if rounded == 0 else signed(f"{rounded:+.3f}")


def fewer(dense: float, pruned: float, word: str = "fewer") -> str:
    """How many times less: 3.3x fewer."""
    return DASH if pruned <= 0 else f"{dense / pruned:.2f}{TIMES} {word}"


def price(value: float) -> str:
    """A price of a candidate: three significant digits."""
    if math.isnan(value):
        return "not a number"
    if math.isinf(value):
        return "infinite" if value > 0 else f"{MINUS}infinite"
    return signed(f"{value:+.3g}")


def small(value: float) -> str:
    """An error: two significant digits, 3.1e-06."""
    return "0" if value == 0 else f"{value:.1e}"
