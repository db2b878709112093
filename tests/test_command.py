"""The command as a person uses it: typed in a shell, on every store."""

from __future__ import annotations

import asyncio
import importlib
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from aidem.__main__ import main
from aidem.persistence import open_persistence_layer
from aidem.persistence.sqlite import SQLitePersistenceLayer
from aidem.testing import claim_of, completed_of
from tests.support import aws_servers, postgres
from tests.support.aws_servers import EMULATORS, Database
from tests.support.records import put
from tests.support.servers import started

WORKER = """
import asyncio, sys
from aidem import IdempotencyConfig, idempotent_function
from aidem.persistence import open_persistence_layer

config = IdempotencyConfig(
    on_abandoned="raise", lease_seconds=0.3, note=lambda arguments: f"order {arguments['order_id']}"
)

@idempotent_function(persistence_store=open_persistence_layer(STORE), config=config, key_prefix="shop.charge")
async def charge(order_id: str) -> dict[str, int]:
    print("running", flush=True)
    await asyncio.sleep(60)

if __name__ == "__main__":
    print(asyncio.run(charge("o-1")))
"""
SECONDS = 60

pytestmark = pytest.mark.timeout(180)  # a session is a dozen processes


database, moto_url, ministack_url = aws_servers.database, aws_servers.moto_url, aws_servers.ministack_url


class Shell:
    """A directory with the module of a service, and a store."""

    def __init__(self, directory: Path, store: str, environment: dict[str, str] | None = None) -> None:
        self.directory = directory
        self.store = store
        self.environment = os.environ | (environment or {}) | {"AIDEM_PERSISTENCE": store}
        (directory / "service.py").write_text(f"STORE = {store!r}\n{WORKER}")

    def typed(self, *arguments: str, code: int = 0) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "aidem", *arguments],
            capture_output=True,
            text=True,
            cwd=self.directory,
            env=self.environment,
            timeout=SECONDS,
        )
        assert done.returncode == code, (done.stdout, done.stderr)
        assert "Traceback" not in done.stderr
        return done.stdout if code == 0 else done.stdout + done.stderr

    def worker(self) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "service.py"],
            stdout=subprocess.PIPE,
            text=True,
            cwd=self.directory,
            env=self.environment,
        )

    def killed_worker(self) -> None:
        with self.worker() as worker:
            assert worker.stdout is not None
            assert worker.stdout.readline() == "running\n"
            worker.kill()
            assert worker.wait(SECONDS) == -signal.SIGKILL

    def until_in_doubt(self) -> str:
        for _ in range(20):
            if listed := self.typed("list", "--in-doubt", "--json"):
                return listed
        raise AssertionError("the key must be in doubt")


def resolves_what_a_killed_worker_left(shell: Shell) -> None:
    shell.typed("create-table")
    assert shell.typed("list") == ""
    shell.killed_worker()
    key = shell.typed("key", "service:charge", "--args", '["o-1"]').strip()
    assert re.fullmatch(r"shop\.charge#[0-9a-f]{64}", key)
    found = json.loads(shell.until_in_doubt())
    assert found["key"] == key
    assert (found["state"], found["status"], found["note"]) == ("in doubt", "INPROGRESS", "order o-1")
    assert found["in_doubt_since"] == found["lease_ends_at"]
    assert "note: order o-1" in shell.typed("show", key)
    shell.typed("resolve", key, "--result", '{"charged": 42}')
    with shell.worker() as worker:
        assert worker.communicate(timeout=SECONDS)[0] == "{'charged': 42}\n"
    assert "has an outcome" in shell.typed("release", key, code=1)
    shell.typed("forget", key)
    assert "there is no record" in shell.typed("show", key, code=1)


def test_a_killed_worker_on_sqlite(tmp_path: Path) -> None:
    resolves_what_a_killed_worker_left(Shell(tmp_path, f"sqlite:///{tmp_path}/records.sqlite3"))


@pytest.mark.server
def test_a_killed_worker_on_redis(tmp_path: Path) -> None:
    with started("valkey") as server:
        resolves_what_a_killed_worker_left(Shell(tmp_path, f"{server.url}?note_attr=comment"))


@pytest.mark.server
@pytest.mark.parametrize("database", EMULATORS[-1:], indirect=True)
def test_a_killed_worker_on_dynamodb(tmp_path: Path, database: Database) -> None:
    store = f"dynamodb://records-{tmp_path.name}?sort_key_attr=sk&key_attr=pk&owner_attr=token"
    resolves_what_a_killed_worker_left(Shell(tmp_path, store, database.environment))


@pytest.mark.server
def test_a_killed_worker_on_postgresql(tmp_path: Path) -> None:
    with postgres.started() as server:
        resolves_what_a_killed_worker_left(Shell(tmp_path, server.url))


# --- In this process --------------------------------------------------------------------------------------------------

KEY = "shop#1"


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "records.sqlite3"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setenv("AIDEM_PERSISTENCE", f"sqlite:///{path}")
    return path


@pytest.fixture
def store(path: Path) -> Path:
    """A store with a claim in doubt, one that has lapsed, one that runs, an outcome, and an expired one."""

    async def fill() -> None:
        async with SQLitePersistenceLayer(path) as layer:
            now = layer.clock()
            long_ago = now - 100
            for key, start, options in (
                (KEY, long_ago, {"may_be_taken_over": False, "note": "order 7\x1b[2J"}),
                ("shop#lapsed", long_ago, {}),
                ("shop#running", now, {"lease_seconds": 600}),
                ("shop#forever", now, {"lease_seconds": None}),
                ("shop#given up", now, {"may_be_taken_over": False}),
                ("shop#done", now, {}),
                ("shop#old", now, {}),
            ):
                claim = claim_of(key, now=start, kept_seconds=1000, **options)
                record = (await layer.acquire(claim, now=now)).record
                if key == "shop#given up":
                    await layer.renew(record.replace(lease_expiry_timestamp=0), now=now)
                if key in {"shop#done", "shop#old"}:
                    kept_seconds = 1000 if key == "shop#done" else -10
                    await layer.complete(completed_of(record, now=now, kept_seconds=kept_seconds), now=now)

    asyncio.run(fill())
    return path


def typed(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> str:
    try:
        found = main(arguments)
    except SystemExit as left:
        found = int(str(left.code or 0))
    output = capsys.readouterr()
    assert found == code, output
    return output.out if code == 0 else output.out + output.err


def test_a_list_can_be_read_on_a_terminal(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    listed = typed(capsys, "list")
    keys = [line for line in listed.splitlines() if not line.startswith(" ")]
    assert keys == sorted(f"shop#{name}" for name in ("1", "done", "forever", "given up", "lapsed", "old", "running"))
    assert all(len(line) < 80 for line in listed.splitlines() if line.startswith(" "))
    for text in (
        r"\n    in doubt since 20[\d-]+T[\d:]+Z, runs again after 20",
        r"in doubt since its owner gave it up, runs",
        r"\n    lapsed at 20[\d-]+T[\d:]+Z: runs at the next call",
        r"\n    running, lease until 20",
        r"\n    completed, kept until 20",
        r"\n    expired, kept until 20",
        r"\n    note: order 7\\x1b\[2J\n",
    ):
        assert re.search(text, listed), text
    assert "paid" not in listed


@pytest.mark.parametrize("state", ["running", "lapsed", "in-doubt", "completed", "expired"])
def test_a_list_can_be_narrowed(store: Path, capsys: pytest.CaptureFixture[str], state: str) -> None:
    lines = typed(capsys, "list", f"--{state}", "--json").splitlines()
    assert {json.loads(line)["state"] for line in lines} == {state.replace("-", " ")}
    assert len(typed(capsys, "list", "--json", "--prefix", "shop#", "--limit", "2").splitlines()) == 2


def test_results_are_shown_only_when_asked_for(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "paid" not in typed(capsys, "show", "shop#done", "--json")
    assert json.loads(typed(capsys, "show", "shop#done", "--json", "--show-results"))["result"] == '{"paid": true}'
    assert 'result: {"paid": true}' in typed(capsys, "show", "shop#done", "--show-results")


def test_a_refused_command_changes_nothing(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = typed(capsys, "list", "--json")
    for arguments, code, sentence in (
        (["release", "unknown"], 1, "there is no record of unknown"),
        (["release", "shop#running"], 1, "is running; wait until its lease has passed"),
        (["resolve", "shop#running", "--unavailable"], 1, "is running"),
        (["forget", "shop#running"], 1, "is running"),
        (["resolve", KEY, "--result", "{"], 2, "is no JSON"),
        (["resolve", KEY, "--result", "1", "--body", "x"], 2, "--header and --body need --status"),
        (["resolve", KEY, "--status", "99"], 2, "cannot be stored"),
        (["resolve", KEY, "--status", "200", "--header", "x"], 2, "is no header"),
        (["resolve", KEY], 2, "required"),
        (["forget", "--prefix", "shop#"], 1, "7 records begin with this prefix; add --yes to drop them"),
        (["forget"], 2, "required"),
        (["nonsense"], 2, "invalid choice"),
        ([], 2, "required"),
    ):
        assert sentence in typed(capsys, *arguments, code=code)
    assert typed(capsys, "list", "--json") == before


def test_keys_are_resolved_released_and_forgotten(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    typed(capsys, "resolve", KEY, "--status", "201", "--header", "content-type: text/plain", "--body", "paid")
    shown = json.loads(typed(capsys, "show", KEY, "--json", "--show-results"))
    assert json.loads(shown["result"]) == {"body": "paid", "headers": [["content-type", "text/plain"]], "status": 201}
    typed(capsys, "resolve", "shop#given up", "--unavailable", "--kept", "5")
    assert json.loads(typed(capsys, "show", "shop#given up", "--json"))["outcome"] == "unavailable"
    typed(capsys, "release", "shop#lapsed", "--max-clock-skew", "1")
    typed(capsys, "release", "shop#running", "--force")
    assert typed(capsys, "purge") == "1 expired records removed\n"
    refused = typed(capsys, "forget", "--prefix", "shop#", "--yes", code=1)
    assert "shop#forever is running" in refused
    assert "3 records forgotten" in refused
    assert typed(capsys, "forget", "--prefix", "shop#", "--yes", "--force") == "1 records forgotten\n"
    assert typed(capsys, "list") == ""


def test_a_store_that_cannot_be_used_is_told(
    path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for command in (["list"], ["show", KEY], ["release", KEY], ["purge"], ["doctor"]):
        assert "does not exist; make it with `aidem create-table`" in typed(capsys, *command, code=3)
    assert not path.exists()
    path.write_text("not a database\n" * 100)
    assert "not an SQLite database" in typed(capsys, "list", code=3)
    for store, code, sentence in (
        ("", 2, "no store is named; give --store, or set AIDEM_PERSISTENCE"),
        ("memory://", 2, "cannot be looked into"),
        ("mysql://host", 3, "names no persistence layer"),
        ("dynamodb://table?colour=red", 3, "'colour' of this URL is not known"),
        ("redis://127.0.0.1:1/0", 3, "cannot be reached"),
        ("records", 2, "write module:name"),
        ("no_such_module:layer", 2, "cannot be imported"),
        ("json:dumps", 2, "is no persistence layer"),
    ):
        assert sentence in typed(capsys, "list", "--store", store, code=code)


def test_a_layer_can_be_imported(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (store.parent / "shop_layers.py").write_text(
        "from aidem.persistence.sqlite import SQLitePersistenceLayer\n"
        f"class Layers:\n    own = SQLitePersistenceLayer({str(store)!r})\n"
    )
    assert "shop#done" in typed(capsys, "list", "--store", "shop_layers:Layers.own")


def test_the_key_of_a_call_is_printed(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (path.parent / "shop_service.py").write_text(f"STORE = 'memory://'\n{WORKER}")
    by_position = typed(capsys, "key", "shop_service:charge", "--args", '["o-1"]')
    assert by_position == typed(capsys, "key", "shop_service:charge", "--args", '{"order_id": "o-1"}')
    moved = typed(capsys, "key", "shop_service:charge", "--args", '["o-1"]', "--key-prefix", "other")
    assert moved == by_position.replace("shop.charge#", "other#")
    assert "must be an array or an object" in typed(capsys, "key", "shop_service:charge", "--args", "7", code=2)
    assert "is not decorated" in typed(capsys, "key", "json:dumps", code=2)


def test_doctor_tells_of_settings_that_endanger_the_promises(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "SQLitePersistenceLayer: it can be reached and used" in typed(capsys, "doctor")
    store.chmod(0o666)
    assert "problem: SQLite: " in typed(capsys, "doctor", code=1)


AHEAD = """
from aidem.persistence.memory import MemoryPersistenceLayer

class Ahead(MemoryPersistenceLayer):
    async def clock_ahead_seconds(self):
        return 100.5

    def get(self, key):
        return super().get("shop#1")

    def take_over(self, found, record, *, max_clock_skew_seconds, **options):
        print(f"skew {max_clock_skew_seconds}")
        return super().take_over(found, record, **options)

layer = Ahead()
"""


def test_how_far_the_clock_is_ahead_is_added_to_leases(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (path.parent / "ahead_layer.py").write_text(AHEAD)
    store = ["--store", "ahead_layer:layer"]
    assert "problem: the clock of this machine is about 100 s ahead" in typed(capsys, "doctor", *store, code=1)
    layer = importlib.import_module("ahead_layer").layer
    asyncio.run(abandoned(layer))
    assert "skew 100.5\n" in typed(capsys, "forget", KEY, *store)
    for command in (["resolve", KEY, "--unavailable"], ["release", KEY]):
        asyncio.run(abandoned(layer))
        assert "skew 101.5\n" in typed(capsys, *command, "--max-clock-skew", "1", *store)


async def abandoned(layer: Any) -> None:
    now = layer.clock() - 10
    await layer.forget(KEY)
    await layer.acquire(claim_of(KEY, now=now, kept_seconds=1000), now=layer.clock())
    put(layer, layer.records()[KEY].replace(in_progress_expiry_timestamp=1))


def test_create_table_makes_a_file(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert typed(capsys, "create-table") == "ready\n"
    assert typed(capsys, "list") == ""


def test_a_pipe_that_closes_ends_the_command_quietly(store: Path) -> None:
    async def fill() -> None:
        async with SQLitePersistenceLayer(store) as layer:
            now = layer.clock()
            await asyncio.gather(
                *(layer.acquire(claim_of(f"many#{n}", now=now, note="x" * 200), now=now) for n in range(500))
            )

    asyncio.run(fill())
    with subprocess.Popen(
        [sys.executable, "-m", "aidem", "list"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as command:
        assert command.stdout is not None
        assert command.stderr is not None
        command.stdout.readline()
        command.stdout.close()
        assert command.wait(SECONDS) == 0
        assert command.stderr.read() == ""


def test_ctrl_c_ends_the_command(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (path.parent / "interrupted_layer.py").write_text("raise KeyboardInterrupt")
    assert typed(capsys, "list", "--store", "interrupted_layer:layer", code=130) == ""


def test_two_operators_at_once_do_not_both_resolve(store: Path, tmp_path: Path) -> None:
    commands = [
        subprocess.Popen(
            [sys.executable, "-m", "aidem", "resolve", KEY, "--result", str(number)], stderr=subprocess.PIPE
        )
        for number in range(2)
    ]
    assert sorted(command.wait(SECONDS) for command in commands) == [0, 1]
    for command in commands:
        command.communicate()


def test_an_instant_beyond_the_calendar_is_shown_as_it_is(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    async def fill() -> None:
        layer: Any = open_persistence_layer(f"sqlite:///{path}")
        async with layer:
            now = layer.clock()
            await layer.acquire(claim_of(KEY, now=now, kept_seconds=10**15), now=now)

    asyncio.run(fill())
    assert json.loads(typed(capsys, "show", KEY, "--json"))["expires_at"].isdecimal()
