from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

import aidem

WORKER = Path(__file__).with_name("sqlite_worker.py")
KEYS = 200


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "records.sqlite3"


def start(*arguments: str | Path, options: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *options, WORKER, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(Path(aidem.__file__).parents[1])},
    )


def run(*arguments: str | Path, options: tuple[str, ...] = ()) -> None:
    """Run a worker, which must end well and say nothing."""
    with start(*arguments, options=options) as worker:
        output = worker.communicate(timeout=50)
        assert (worker.returncode, *output) == (0, "", "")


def keys_in(path: Path, where: str) -> set[str]:
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        return {key for (key,) in connection.execute(f"SELECT id FROM records WHERE {where}")}


def test_processes_that_start_at_once_share_a_new_file_and_each_key_goes_to_one(path: Path) -> None:
    workers = [start("contend", path, str(KEYS)) for _ in range(4)]
    for worker in workers:
        assert worker.stdout is not None
        assert worker.stdout.readline() == "ready\n"
    assert not path.exists()
    for worker in workers:
        assert worker.stdin is not None
        worker.stdin.write("go\n")
        worker.stdin.flush()
    claims = list[int]()
    for worker in workers:
        with worker:
            output, errors = worker.communicate(timeout=50)
            assert (worker.returncode, errors) == (0, "")
            claims += map(int, output.split())
    assert sorted(claims) == list(range(KEYS))


def test_what_was_answered_is_there_after_a_kill(path: Path) -> None:
    with start("write", path) as worker:
        assert worker.stdout is not None
        answered = {worker.stdout.readline() for _ in range(200)}
        worker.kill()
        output, errors = worker.communicate(timeout=50)
        assert (worker.returncode, errors) == (-signal.SIGKILL, "")
    lines = "".join(answered) + output
    assert path.with_name(f"{path.name}-wal").exists(), "it was closed, not killed"
    assert set(lines.splitlines()) <= keys_in(path, "status = 'COMPLETED' AND data = '{\"paid\": true}'")


@pytest.mark.parametrize("command", ["leave", "leave_open"])
def test_an_interpreter_that_exits_writes_what_is_queued_and_closes_the_file(path: Path, command: str) -> None:
    run(command, path, options=("-W", "error"))
    assert os.listdir(path.parent) == [path.name]  # noqa: PTH208 - names
    assert len(keys_in(path, "status = 'INPROGRESS'")) == {"leave": 1000, "leave_open": 1}[command]


def test_a_forked_child_uses_a_connection_of_its_own(path: Path) -> None:
    run("fork", path, options=("-W", "ignore::DeprecationWarning"))
    assert {f"child-{number}" for number in range(20)} | {"parent"} <= keys_in(path, "status = 'INPROGRESS'")
    assert len(keys_in(path, "id LIKE 'thread-%'")) >= 20
