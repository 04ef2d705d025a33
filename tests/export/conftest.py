"""Fixtures over `tests.exported`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.exported import IMAGE, PROMPT_TOKENS, VOCABULARY, Bundles, Case, make_bundles, make_case, make_folders


@pytest.fixture(scope="session")
def case() -> Callable[..., Case]:
    """`case(kind)`: kind one of dense, tokens, parameters, everything; cached for the session."""
    cache: dict[tuple, Case] = {}

    def get(kind: str, **options: Any) -> Case:
        key = (kind, *sorted(options.items()))
        if key not in cache:
            cache[key] = make_case(kind, **options)
        return cache[key]

    return get


@pytest.fixture
def prompt() -> Callable[..., torch.Tensor]:
    """`prompt(image_tokens, text)`: ids [1, n] of a prompt with `text` text tokens around the image placeholders."""

    def make(image_tokens: int, text: int = PROMPT_TOKENS, seed: int = 0) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        words = torch.randint(4, VOCABULARY, (text,), generator=generator).tolist()
        return torch.tensor([words[:3] + [IMAGE] * image_tokens + words[3:]])

    return make


@pytest.fixture(scope="session")
def folders() -> dict[str, Path]:
    """Model folders `dense` and `pruned`."""
    return make_folders()


@pytest.fixture(scope="session")
def bundles() -> Bundles:
    """ExecuTorch bundles of the pruned folder (takes a minute)."""
    return make_bundles()
