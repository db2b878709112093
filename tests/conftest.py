"""What every test shares."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from hypothesis import settings

# A job in the background of a shell ignores Ctrl-C, and its children inherit that; tests of it need the usual answer.
signal.signal(signal.SIGINT, signal.default_int_handler)

# A client reads its certificates when it is made, which takes longer than most tests: here it is one, of nobody.
os.environ["SSL_CERT_FILE"] = str(Path(__file__).with_name("data") / "ca.pem")

# How long an example takes depends on who else uses the machine; pytest-timeout bounds the whole test.
settings.register_profile("aidem", deadline=None)
settings.load_profile("aidem")


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    """Run async tests on asyncio, the one loop that aidem supports."""
    return "asyncio"
