"""Time that a test has stopped by other means than a clock of ours."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from aidem.persistence.memory import MemoryPersistenceLayer
from aidem.persistence.sqlite import SQLitePersistenceLayer

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("layer", ["memory", "sqlite", "without-clock"])
def test_time_that_freezegun_stops_and_moves_decides(layer: str, tmp_path: Path) -> None:
    name = str(tmp_path / "records") if layer == "sqlite" else layer
    run = subprocess.run([sys.executable, "-m", "tests.support.frozen", name], cwd=ROOT, capture_output=True, text=True)
    assert (run.returncode, run.stderr) == (0, "")


def test_the_clock_is_looked_up_at_every_call(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    layers = MemoryPersistenceLayer(), SQLitePersistenceLayer(tmp_path / "records")
    monkeypatch.setattr("time.time", lambda: 5.0)
    assert [layer.clock() for layer in layers] == [5.0, 5.0]
