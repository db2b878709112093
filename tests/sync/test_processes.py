"""Blocking calls in processes that end, fork, or are started by `multiprocessing`."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from aidem import sync
from aidem.persistence.sqlite import SQLitePersistenceLayer

ROOT = Path(__file__).parents[2]
PATIENCE_SECONDS = 40.0


@pytest.fixture(autouse=True)
def _fresh_loop() -> Iterator[None]:
    yield
    sync.close()


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "records.db")


def play(scene: str, path: str) -> list[str]:
    """Run a scene in a process with every warning an error; return what it said."""
    command = [sys.executable, "-m", "tests.support.sync_exits", scene, path]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_SECONDS)
    assert done.stderr == ""
    assert done.returncode == 0
    return done.stdout.splitlines()


@pytest.mark.parametrize(
    ("scene", "said"),
    [
        ("plain", ["1"]),
        ("closed", ["1"]),
        ("thread-after-main", ["1", "2"]),
        ("call-at-exit", ["1", "1"]),
    ],
)
def test_an_interpreter_exits_without_a_word(scene: str, said: list[str], path: str) -> None:
    assert play(scene, path) == said


@pytest.mark.parametrize("scene", ["daemon-in-body", "daemon-waiting"])
def test_an_interpreter_does_not_wait_for_daemon_threads_in_calls(scene: str, path: str) -> None:
    assert sorted(play(scene, path)) == ["1", "in the body"]


def test_a_child_forked_in_a_body_owns_nothing_and_can_make_calls_of_its_own(path: str) -> None:
    assert play("forked", path) == [
        "the child does not own the claim",
        "the child gets 7 of its own",
        "child gets IdempotencyLeaseLostError",
        "child left with 0",
        "parent gets the parent's",
        "a replay gets the parent's",
    ]


def test_a_child_forked_in_a_body_that_fails_does_not_give_the_parents_key_back(path: str) -> None:
    assert play("forked-and-failing", path) == [
        "the child does not own the claim",
        "the child gets 7 of its own",
        "child gets ValueError",
        "child left with 0",
        "parent gets the parent's",
        "a replay gets the parent's",
    ]


def test_a_child_forked_while_another_thread_starts_a_call_can_make_calls(path: str) -> None:
    assert play("forked-while-asking", path) == ["1", "child left with 0"]


def test_a_client_of_the_background_loop_is_closed_at_exit(path: str) -> None:
    assert play("client", path) == ["1", "closed"]


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_processes_of_multiprocessing_run_each_key_once(method: str, path: str) -> None:
    assert play(f"multiprocessing-{method}", path) == ["1", str(sorted([*range(2, 8), *range(2, 8)]))]
    log = Path(f"{path}.log").read_text(encoding="utf-8").split()
    assert Counter(log) == Counter(map(str, range(1, 8)))


def test_an_uncaught_interrupt_leaves_no_claim(path: str) -> None:
    command = [sys.executable, "-m", "tests.support.sync_exits", "uncaught-interrupt", path]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "in the body\n"
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == -signal.SIGINT
    assert errors.rstrip().endswith("KeyboardInterrupt")
    assert "ignored" not in errors
    layer = SQLitePersistenceLayer(path)
    assert (
        sync.idempotent_function(persistence_store=layer, key_prefix="tests.support.sync_exits.hang")(lambda: 1)() == 1
    )
