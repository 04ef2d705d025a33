"""What all tests share: a clean environment, and a LLaVA with a task that run in milliseconds."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

# Before anything imports huggingface_hub, which reads it once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import hypothesis
import pytest
import torch

from tests import tiny

# How long an example takes says more about the machine than about the code.
hypothesis.settings.register_profile("comp-edge", deadline=None, derandomize=True)
hypothesis.settings.load_profile("comp-edge")


@pytest.fixture(scope="session", autouse=True)
def environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Data sets are cached for the session only; one thread, so that results do not depend on the machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COMP_EDGE_CACHE", str(tmp_path_factory.mktemp("comp-edge-cache")))
        yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """A test draws the same random numbers alone and among others."""
    tiny.seed_everything(0)


@pytest.fixture(scope="session")
def processor() -> Any:
    """The processor of `llava-digits` for the tiny model (64x64 px, patch 16: 16 image tokens)."""
    return tiny.make_processor()


@pytest.fixture(scope="session")
def make_model() -> Callable[..., Any]:
    """`make_model(seed=0, vision_layers=3, language_layers=3, width=32, heads=4, kv_heads=2, ...)`; see `tests.tiny`."""
    return tiny.make_model


@pytest.fixture
def tiny_model() -> Any:
    """A fresh tiny LLaVA in eval mode."""
    return tiny.make_model()


@pytest.fixture(scope="session")
def tiny_task(processor: Any) -> tiny.TinyVQA:
    """Forty training images, twenty for validation and for the test (tasks are never changed by a run)."""
    return tiny.TinyVQA(processor)
