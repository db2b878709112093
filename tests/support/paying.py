"""Starts workers of `paying_worker.py`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import aidem

WORKER = Path(__file__).with_name("paying_worker.py")


def start_worker(database: str | Path, log: Path, *, seed: int, keys: int, how: str) -> subprocess.Popen[bytes]:
    """Start a worker; its arguments are described there."""
    return subprocess.Popen(
        [sys.executable, str(WORKER), str(database), str(log), str(seed), str(keys), how],
        env=os.environ | {"PYTHONPATH": str(Path(aidem.__file__).parents[1])},
    )
