"""Fixtures over `tests.exported`."""

from __future__ import annotations

import pytest

from tests.exported import Bundles, make_bundles


@pytest.fixture(scope="session")
def bundles() -> Bundles:
    """ExecuTorch bundles of a pruned model (takes a minute)."""
    return make_bundles()
