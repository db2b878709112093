"""Async Lambda handlers in processes that end, fork, or are interrupted."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from aidem import sync
from aidem.persistence.sqlite import SQLitePersistenceLayer

ROOT = Path(__file__).parents[2]
PATIENCE_SECONDS = 40.0


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "records.db")


def play(scene: str, path: str, *, python: tuple[str, ...] = ("-m", "tests.support.awslambda.scenes")) -> list[str]:
    """Run a scene in a process with every warning an error; return what it said."""
    command = [sys.executable, *python, scene, path]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_SECONDS)
    assert done.stderr == ""
    assert done.returncode == 0
    return done.stdout.splitlines()


def test_an_interpreter_exits_without_a_word(path: str) -> None:
    assert play("plain", path) == ["effect 1", "1"]


def test_a_client_of_the_kept_loop_is_closed_at_exit(path: str) -> None:
    assert play("client-open", path) == ["closed"]


def test_without_the_package_for_snapshots_nothing_is_missing(path: str) -> None:
    start = "import runpy, sys; sys.modules['snapshot_restore_py'] = None; runpy.run_module('{}', run_name='__main__')"
    python = ("-c", start.format("tests.support.awslambda.scenes"))
    assert play("plain", path, python=python) == ["effect 1", "1"]


def test_a_forked_child_gets_a_loop_of_its_own_and_leaves_that_of_its_parent_alone(path: str) -> None:
    said = play("forked", path)
    assert sorted(said) == sorted(["effect 1", "1", "1", "1", "effect 2", "2", "child left with 0", "2"])
    assert said[-1] == "2"


def test_a_child_that_a_handler_forks_can_be_terminated(path: str) -> None:
    assert play("forking", path) == ["child left with -15"]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, -signal.SIGINT), (signal.SIGTERM, 128 + signal.SIGTERM)])
def test_an_interrupted_process_leaves_no_claim(number: signal.Signals, code: int, path: str) -> None:
    command = [sys.executable, "-m", "tests.support.awslambda.scenes", "interrupted", path]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "in the handler\n"
        process.send_signal(number)
        _, errors = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == code, errors
    assert "never retrieved" not in errors
    layer = SQLitePersistenceLayer(path)
    assert (
        sync.idempotent(persistence_store=layer, key_prefix="hanging")(lambda event, context: "free")(1, None) == "free"
    )
    sync.close()
