from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

import aidem
from aidem.persistence.sqlite import SQLitePersistenceLayer

WORKER = Path(__file__).parents[2] / "support" / "sqlite_worker.py"
KEYS = 200


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "records.sqlite3"


@contextlib.contextmanager
def worker(*arguments: str | Path, options: tuple[str, ...] = ()) -> Iterator[subprocess.Popen[str]]:
    """Run a worker; nothing of it is left behind, nor of its children."""
    process = subprocess.Popen(
        [sys.executable, *options, WORKER, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(Path(aidem.__file__).parents[1])},
        start_new_session=True,
    )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def run(*arguments: str | Path, options: tuple[str, ...] = ()) -> None:
    """Run a worker, which must end well and say nothing."""
    with worker(*arguments, options=options) as process:
        output = process.communicate(timeout=50)
        assert (process.returncode, *output) == (0, "", "")


def next_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline()


def keys_in(path: Path, where: str) -> set[str]:
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        return {key for (key,) in connection.execute(f"SELECT id FROM records WHERE {where}")}


def test_processes_that_start_at_once_share_a_new_file_and_each_key_goes_to_one(path: Path) -> None:
    with contextlib.ExitStack() as stack:
        processes = [stack.enter_context(worker("contend", path, str(KEYS))) for _ in range(4)]
        assert [next_line(process) for process in processes] == ["ready\n"] * 4
        assert not path.exists()
        for process in processes:
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
        claims = list[int]()
        for process in processes:
            output, errors = process.communicate(timeout=50)
            assert (process.returncode, errors) == (0, "")
            claims += map(int, output.split())
    assert sorted(claims) == list(range(KEYS))


async def test_a_look_waits_while_another_process_repairs_the_index_of_the_log(path: Path) -> None:
    async with SQLitePersistenceLayer(path, busy_timeout_seconds=30) as layer:
        with worker("repair", path) as other:
            assert next_line(other) == "ready\n"
            look = layer.get("key")
            done, _ = await asyncio.wait([look], timeout=0.1)
            assert not done
            assert other.communicate("let go\n") == ("", "")
            assert await look is None


def test_what_was_answered_is_there_after_a_kill(path: Path) -> None:
    with worker("write", path) as process:
        answered = "".join(next_line(process) for _ in range(200))
        process.kill()
        output, errors = process.communicate(timeout=50)
        assert (process.returncode, errors) == (-signal.SIGKILL, "")
    assert path.with_name(f"{path.name}-wal").exists(), "it was closed, not killed"
    keys = set((answered + output).splitlines())
    assert len(keys) >= 200
    assert keys <= keys_in(path, "status = 'COMPLETED' AND data = '{\"paid\": true}'")


@pytest.mark.parametrize("command", ["leave", "leave_open"])
def test_an_interpreter_that_exits_writes_what_is_queued_and_closes_the_file(path: Path, command: str) -> None:
    run(command, path, options=("-W", "error"))
    assert os.listdir(path.parent) == [path.name]  # noqa: PTH208 - names
    assert len(keys_in(path, "status = 'INPROGRESS'")) == {"leave": 1000, "leave_open": 1}[command]


def test_a_forked_child_uses_a_connection_of_its_own(path: Path) -> None:
    run("fork", path, options=("-W", "ignore::DeprecationWarning"))
    assert {f"child-{number}" for number in range(20)} | {"parent"} <= keys_in(path, "status = 'INPROGRESS'")
    assert len(keys_in(path, "id LIKE 'thread-%'")) >= 20
