"""What every test shares."""

from __future__ import annotations

import pytest
from hypothesis import settings

# How long an example takes depends on who else uses the machine; pytest-timeout bounds the whole test.
settings.register_profile("aidem", deadline=None)
settings.load_profile("aidem")


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    """Run async tests on asyncio, the one loop that aidem supports."""
    return "asyncio"
