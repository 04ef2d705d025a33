"""Filling in a page: this folder's templates, and those of others that build on its style."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

import comp_edge
from comp_edge.report import theme


def render(name: str, context: Mapping[str, Any], *, folder: Path | None = None) -> str:
    """A template with a complete context; values are escaped.

    Args:
        folder: further templates, which may include those of this folder.
    """
    folders = [Path(__file__).parent] if folder is None else [folder, Path(__file__).parent]
    environment = Environment(
        loader=FileSystemLoader(folders),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    common = {"palette": theme.PALETTE, "role": theme.role, "version": comp_edge.__version__}
    return environment.get_template(name).render(common | dict(context))
