"""`aidem.sync` under gevent, with the pools of Celery and gunicorn; eventlet is refused."""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import pytest
from celery import Celery

from aidem._runtime import greenlets
from tests.support.aws_servers import Database
from tests.support.servers import RedisServer, started

T = TypeVar("T")

ROOT = Path(__file__).parents[2]
PATIENCE_SECONDS = 50.0
DELIVERIES = 8


def play(scene: str, layer: str) -> None:
    command = [sys.executable, "-W", "error", "-m", "tests.support.greenlets", scene, layer]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_SECONDS)
    assert done.stderr == ""
    assert done.returncode == 0


@pytest.fixture
def sqlite(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/records.sqlite3"


@pytest.fixture(scope="module")
def redis_server() -> Iterator[RedisServer]:
    with started("redis") as server:
        yield server


@pytest.fixture(
    params=["memory", "sqlite", *(pytest.param(server, marks=pytest.mark.server) for server in ("redis", "dynamodb"))]
)
def layer(request: pytest.FixtureRequest, sqlite: str, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "redis":  # by a name that has to be looked up
        server: RedisServer = request.getfixturevalue("redis_server")
        return server.url.replace("127.0.0.1", "localhost")
    if request.param == "dynamodb":
        database = Database(request.getfixturevalue("moto_url").replace("127.0.0.1", "localhost"))
        for name, value in database.environment.items():
            monkeypatch.setenv(name, value)
        return f"dynamodb://{database.create_table()}"
    return sqlite if request.param == "sqlite" else "memory://"


@pytest.mark.parametrize("scene", ["together", "killed", "closed-again-and-again"])
def test_greenlets_make_each_effect_once_on_every_layer(scene: str, layer: str) -> None:
    play(scene, layer)


@pytest.mark.parametrize("scene", ["imported-first", "threads-unpatched"])
def test_aidem_may_be_imported_before_gevent_patches_and_threads_may_stay_unpatched(scene: str, sqlite: str) -> None:
    play(scene, sqlite)


@pytest.mark.server
def test_gevent_may_patch_after_a_call_and_before_the_first_connection(redis_server: RedisServer) -> None:
    play("patched-late", redis_server.url.replace("127.0.0.1", "localhost"))


@pytest.mark.parametrize("scene", ["killed-in-its-body", "timed-out"])
def test_a_greenlet_that_is_killed_or_timed_out_gives_its_key_back_at_once(scene: str, sqlite: str) -> None:
    play(scene, sqlite)


@pytest.mark.parametrize("scene", ["ensured", "in-threads-of-the-hub", "called-by-the-hub", "forked"])
def test_calls_come_from_any_greenlet_thread_or_process(scene: str, sqlite: str) -> None:
    play(scene, sqlite)


def test_eventlet_is_refused_before_the_body_by_a_sentence_that_names_it() -> None:
    play("eventlet", "memory://")


# --- The loop and the thread ----------------------------------------------------------------------------------------


def in_a_thread(main: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """Run a coroutine on the loop that gevent's users get, in the thread that they get."""
    answers: list[T] = []

    def run() -> None:
        with asyncio.Runner(loop_factory=greenlets.GeventLoop) as runner:
            answers.append(runner.run(main()))

    thread = greenlets.OSThread(run)
    thread.start()
    thread.join(PATIENCE_SECONDS)
    [answer] = answers
    return answer


def test_a_thread_can_be_waited_for_with_and_without_a_limit() -> None:
    end = threading.Event()
    thread = greenlets.OSThread(end.wait)
    thread.start()
    thread.join(0.01)
    assert thread.is_alive()
    end.set()
    thread.join()
    thread.join()
    assert not thread.is_alive()


def test_what_the_loop_calls_in_a_thread_answers_raises_or_is_given_up() -> None:
    go_on = threading.Event()

    async def call_some() -> list[Any]:
        loop = asyncio.get_running_loop()
        given_up = loop.run_in_executor(None, go_on.wait)
        given_up.cancel()
        go_on.set()
        calls = (asyncio.to_thread(divmod, 7, divisor) for divisor in (2, 0))
        answers = await asyncio.gather(*calls, given_up, return_exceptions=True)
        await asyncio.sleep(0.05)  # for what was given up to end
        return answers

    quotient, failure, cancellation = in_a_thread(call_some)
    assert quotient == (3, 1)
    assert isinstance(failure, ZeroDivisionError)
    assert isinstance(cancellation, asyncio.CancelledError)


# --- Pools ----------------------------------------------------------------------------------------------------------


@contextmanager
def serving(*command: str, directory: Path) -> Iterator[Callable[[], str]]:
    """Run a server; yield what reads its log."""
    log = directory / "log"
    environment = os.environ | {"AIDEM_TEST_DIRECTORY": str(directory), "PYTHONWARNINGS": "ignore"}
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", *command], cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT
        )
    try:
        yield lambda: log.read_text(encoding="utf-8")
    finally:
        process.terminate()
        try:
            process.wait(PATIENCE_SECONDS / 4)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def until(answer: Callable[[], bool], log: Callable[[], str]) -> None:
    deadline = time.monotonic() + 0.8 * PATIENCE_SECONDS
    while not answer():
        assert time.monotonic() < deadline, log()
        time.sleep(0.05)


def lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []


@pytest.mark.server
@pytest.mark.parametrize("options", [[], ["--preload"]], ids=["each worker imports", "the parent imports"])
def test_workers_of_gunicorn_charge_once_while_requests_wait(options: list[str], tmp_path: Path) -> None:
    command = ["gunicorn", "-k", "gevent", "-w", "2", "-b", "127.0.0.1:0", "--graceful-timeout", "1", *options]
    with serving(*command, "tests.support.greenlet_servers:application", directory=tmp_path) as log:
        until(lambda: len(re.findall(r"Booting worker", log())) == 2, log)
        [url] = re.findall(r"Listening at: (http://\S+)", log())

        def request(number: int) -> str:
            with urllib.request.urlopen(f"{url}/o-{number % 2}", timeout=PATIENCE_SECONDS / 2) as response:
                return response.read().decode()

        with ThreadPoolExecutor(DELIVERIES) as clients:
            answers = list(clients.map(request, range(DELIVERIES)))
    assert answers == ["charged /o-0", "charged /o-1"] * (DELIVERIES // 2)
    assert sorted(lines(tmp_path / "effects")) == ["/o-0", "/o-1"]


@pytest.mark.server
def test_tasks_of_celery_that_are_delivered_again_charge_once(tmp_path: Path) -> None:
    (tmp_path / "queue").mkdir()
    sender = Celery(broker="filesystem://")
    sender.conf.broker_transport_options = {
        "data_folder_in": str(tmp_path / "queue"),
        "data_folder_out": str(tmp_path / "queue"),
        "control_folder": str(tmp_path / "control"),
    }
    for number in range(DELIVERIES):
        sender.send_task("charge", [f"o-{number % 2}"])
    command = ["celery", "-A", "tests.support.greenlet_servers:queue", "worker", "-P", "gevent", "-c", str(DELIVERIES)]
    with serving(*command, directory=tmp_path) as log:
        until(lambda: len(lines(tmp_path / "answers")) == DELIVERIES, log)
    assert sorted(lines(tmp_path / "answers")) == sorted(["charged o-0", "charged o-1"] * (DELIVERIES // 2))
    assert sorted(lines(tmp_path / "effects")) == ["o-0", "o-1"]
