"""The checkout of docs/examples, run as a reader of the documentation runs it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from tests.support.servers import free_port

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"
DEADLINE_SECONDS = 60.0


@contextlib.contextmanager
def checkout(directory: Path) -> Iterator[str]:
    """Run it, with its files in a directory, and give its URL once both workers are up."""
    port = free_port()
    environment = os.environ | {"PORT": str(port), "CHECKOUT_FOLDER": str(directory)}
    with (directory / "output.txt").open("ab") as output:
        process = subprocess.Popen(
            [sys.executable, str(EXAMPLES / "checkout.py")],
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + DEADLINE_SECONDS
        while (printed := (directory / "output.txt").read_text()).count("startup complete") < 2:
            assert process.poll() is None, printed
            assert time.monotonic() < deadline, printed
            time.sleep(0.02)
        yield f"http://127.0.0.1:{port}"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
