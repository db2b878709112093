"""The command as a person uses it: typed in a shell, on every store."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import io
import json
import os
import pty
import re
import secrets
import signal
import subprocess
import sys
import time
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
from tests.support.redis_clusters import cluster
from tests.support.servers import started

WORKER = """
import asyncio, os, sys
from aidem import IdempotencyConfig, idempotent_function
from aidem.persistence import open_persistence_layer

config = IdempotencyConfig(
    on_abandoned="raise",
    lease_seconds=float(os.environ.get("LEASE_SECONDS", "1")),
    note=lambda arguments: f"order {arguments['order_id']}",
)

@idempotent_function(persistence_store=open_persistence_layer(STORE), config=config, key_prefix="shop.charge")
async def charge(order_id: str) -> dict[str, int]:
    print("running", flush=True)
    await asyncio.sleep(60)

if __name__ == "__main__":
    print(asyncio.run(charge(sys.argv[1])))
"""
SECONDS = 60

pytestmark = pytest.mark.timeout(180)  # a session is a dozen processes


database, moto_url, ministack_url = aws_servers.database, aws_servers.moto_url, aws_servers.ministack_url


class Shell:
    """A directory with the module of a service, and a store."""

    def __init__(self, directory: Path, store: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self.service = f"service_{secrets.token_hex(4)}"
        (directory / f"{self.service}.py").write_text(f"STORE = {store!r}\n{WORKER}")
        self.store = store
        monkeypatch.chdir(directory)
        monkeypatch.setattr(sys, "path", [*sys.path])
        monkeypatch.setenv("AIDEM_PERSISTENCE", store)

    def started(self, *command: str, **variables: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, *command],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | variables,
        )

    def typed(self, *arguments: str, code: int = 0) -> str:
        """Type a command, in this process: a session is some twenty of them."""
        output, errors = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
            assert main(arguments) == code, (output.getvalue(), errors.getvalue())
        return output.getvalue() + errors.getvalue() * bool(code)

    def typed_until_lapsed(self, *arguments: str) -> str:
        """Type a command again and again while it says that the lease has hardly lapsed.

        How far this clock is ahead of the store's is added to the lease, and after a slow answer it seems to be.
        """
        deadline = time.monotonic() + SECONDS
        while time.monotonic() < deadline:
            output, errors = io.StringIO(), io.StringIO()
            with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
                code = main(arguments)
            if code == 0:
                return output.getvalue()
            assert "has hardly lapsed" in errors.getvalue()
        raise AssertionError("the lease must lapse")

    def typed_by_two(self, *arguments: str) -> None:
        """Have two operators type a command at once; one of them is refused."""
        commands = [self.started("-m", "aidem", *arguments) for _ in range(2)]
        ends = [command.communicate(timeout=SECONDS) for command in commands]
        assert sorted(command.returncode for command in commands) == [0, 1], ends

    def running_worker(self, order: str, *, lease_seconds: float) -> subprocess.Popen[str]:
        worker = self.started(f"{self.service}.py", order, LEASE_SECONDS=f"{lease_seconds}")
        assert worker.stdout is not None
        assert worker.stdout.readline() == "running\n"
        return worker

    def killed_worker(self, order: str) -> None:
        with self.running_worker(order, lease_seconds=1) as worker:
            worker.kill()
            assert worker.wait(SECONDS) == -signal.SIGKILL

    def key_of(self, order: str) -> str:
        key = self.typed("key", f"{self.service}:charge", "--args", f'["{order}"]').strip()
        assert re.fullmatch(r"shop\.charge#[0-9a-f]{64}", key)
        return key

    def until_in_doubt(self) -> str:
        deadline = time.monotonic() + SECONDS
        while time.monotonic() < deadline:
            if listed := self.typed("list", "--in-doubt", "--json"):
                if self.store.startswith("dynamodb"):
                    time.sleep(1.1)  # a clock told in whole seconds may be so far behind, which is added to leases
                return listed
            time.sleep(0.05)  # the lease that passes is judged by the clock of the server
        raise AssertionError("the key must be in doubt")


def clears_doubts(shell: Shell) -> None:
    """Type the session of operators at two keys in doubt, of which one has happened and the other has not."""
    shell.typed("create-table")
    assert shell.typed("list") == ""
    key = shell.key_of("o-1")
    shell.killed_worker("o-1")
    found = json.loads(shell.until_in_doubt())
    assert found["key"] == key
    assert (found["state"], found["status"], found["note"]) == ("in doubt", "INPROGRESS", "order o-1")
    assert found["in_doubt_since"] == found["lease_ends_at"]
    assert "note: order o-1" in shell.typed("show", key)
    shell.typed_by_two("resolve", key, "--result", '{"charged": 42}')
    with shell.started(f"{shell.service}.py", "o-1") as worker:
        assert worker.communicate(timeout=SECONDS)[0] == "{'charged': 42}\n"
    assert "has an outcome" in shell.typed("release", key, code=1)
    shell.typed("forget", key)
    assert "there is no record" in shell.typed("show", key, code=1)

    shell.killed_worker("o-2")
    key = json.loads(shell.until_in_doubt())["key"]
    shell.typed_by_two("release", key)
    with shell.running_worker("o-2", lease_seconds=5) as worker:  # it runs again, and may have to wait for a processor
        for command in (["release", key], ["resolve", key, "--result", "1"], ["forget", key]):
            assert "is running (note: order o-2): its lease holds until 20" in shell.typed(*command, code=1)
        worker.kill()
    assert json.loads(shell.until_in_doubt())["key"] == key
    assert "1 record with this prefix" in shell.typed("forget", "--prefix", "shop.charge#", code=1)
    assert shell.typed_until_lapsed("forget", "--prefix", "shop.charge#", "--yes") == "1 record forgotten\n"
    assert shell.typed("list") == ""


def test_doubts_on_sqlite_are_cleared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clears_doubts(Shell(tmp_path, f"sqlite:///{tmp_path}/records.sqlite3", monkeypatch))


def test_doubts_in_the_file_of_an_application_are_cleared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = f"sqlite:///{tmp_path}/application.sqlite3?in_application_database=true"
    clears_doubts(Shell(tmp_path, store, monkeypatch))


@pytest.mark.server
def test_doubts_on_redis_are_cleared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with started("valkey") as server:
        clears_doubts(Shell(tmp_path, f"{server.url}?note_attr=comment", monkeypatch))


@pytest.mark.server
def test_doubts_on_a_cluster_of_redis_are_cleared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with cluster("redis") as nodes:
        shell = Shell(tmp_path, f"redis+cluster://127.0.0.1:{nodes[-1].port}?owner_attr=token", monkeypatch)
        clears_doubts(shell)
        assert "mode: cluster, 3 primaries" in shell.typed("doctor", code=1)


@pytest.mark.server
@pytest.mark.parametrize("database", EMULATORS[-1:], indirect=True)
@pytest.mark.parametrize("options", ["", "?sort_key_attr=sk&key_attr=pk&owner_attr=token&note_attr=comment"])
def test_doubts_on_dynamodb_are_cleared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, database: Database, options: str
) -> None:
    table = f"records-{secrets.token_hex(8)}"
    clears_doubts(Shell(tmp_path, f"dynamodb://{table}{options}", monkeypatch))
    keys = database.client.describe_table(TableName=table)["Table"]["KeySchema"]
    assert [key["AttributeName"] for key in keys] == (["pk", "sk"] if options else ["id"])


@pytest.mark.server
def test_doubts_on_postgresql_are_cleared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with postgres.started() as server:
        clears_doubts(Shell(tmp_path, server.url, monkeypatch))


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
    """A store with claims in doubt, one that has lapsed, those that run, an outcome, and an expired one."""

    async def fill() -> None:
        async with SQLitePersistenceLayer(path) as layer:
            now = layer.clock()
            long_ago = now - 100
            for key, start, options in (
                (KEY, long_ago, {"may_be_taken_over": False, "note": "order 7\x1b[2J"}),
                ("shop#request", long_ago, {"may_be_taken_over": False, "payload_hash": "http:hash"}),
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
    names = ("1", "done", "forever", "given up", "lapsed", "old", "request", "running")
    assert keys == [f"shop#{name}" for name in names]
    assert all(len(line) < 80 for line in listed.splitlines() if line.startswith(" "))
    for text in (
        r"\n    in doubt since 20[\d-]+T[\d:]+Z, runs again after 20",
        r"in doubt since its owner gave it up, runs",
        r"\n    lapsed at 20[\d-]+T[\d:]+Z: runs at the next call",
        r"\n    running, lease until 20",
        r"\n    completed, kept until 20",
        r"\n    expired, kept until 20",
        r"shop#request\n    in doubt [^\n]*\n    an HTTP request\n",
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
        (["release", "shop#running"], 1, "is running: its lease holds until 20"),
        (["resolve", "shop#running", "--unavailable"], 1, "is running"),
        (["forget", "shop#running"], 1, "is running"),
        (["release", "shop#done"], 1, "has an outcome; drop it with forget"),
        (["show", "1"], 1, "there is no record of 1"),
        (["resolve", KEY, "--result", "{"], 2, "is no JSON"),
        (["resolve", KEY, "--result", "NaN"], 2, "is no JSON: NaN is not in JSON"),
        (["resolve", KEY, "--result", "[1.5, 1e999]"], 2, "is no JSON: 1e999 is not in JSON"),
        (["resolve", KEY, "--result", "[" * 100_000], 2, "is no JSON"),
        (["resolve", KEY, "--result", "1", "--unavailable"], 2, "not allowed with"),
        (["resolve", KEY, "--status", "200"], 1, "is the key of a function or a block, not of an HTTP request"),
        (["resolve", "shop#request", "--result", "{}"], 1, "is the key of an HTTP request; resolve it with its resp"),
        *((["resolve", KEY, "--unavailable", "--kept", n], 2, "kept_seconds") for n in ("0", "-1", "inf", "nan")),
        *((["release", KEY, "--max-clock-skew", n], 2, "max_clock_skew_seconds") for n in ("-1", "inf", "nan")),
        (["resolve", KEY, "--unavailable", "--kept", "1h"], 2, "invalid float value"),
        (["resolve", KEY, "--unav"], 2, "required"),
        (["resolve", "", "--unavailable"], 2, "must not be empty"),
        (["list", "--limit", "-1"], 2, "limit"),
        (["list", "--in-doubt", "--running"], 2, "not allowed with"),
        (["show", "\udcff"], 2, "an argument is not text in the encoding of this terminal"),
        (["resolve", KEY, "--result", "1", "--body", "x"], 2, "--header and --body need --status"),
        (["resolve", KEY, "--status", "99"], 2, "cannot be stored"),
        (["resolve", KEY, "--status", "200", "--header", "x"], 2, "is no header"),
        (["resolve", KEY, "--status", "200", "--header", "x: \u20ac"], 2, "letters that headers cannot have"),
        (["resolve", KEY], 2, "required"),
        (["forget", "--prefix", "shop#"], 1, "8 records with this prefix; add --yes to drop what is not running"),
        (["forget", "--prefix", "", "--yes"], 2, "must not be empty"),
        (["forget", "--yes"], 2, "required"),
        (["forget"], 2, "required"),
        (["nonsense"], 2, "invalid choice"),
        ([], 2, "required"),
    ):
        assert sentence in typed(capsys, *arguments, code=code)
    assert typed(capsys, "list", "--json") == before


def test_keys_are_resolved_released_and_forgotten(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    response = ("--status", "201", "--header", "content-type: text/plain", "--body", "paid")
    typed(capsys, "resolve", "shop#request", *response)
    shown = json.loads(typed(capsys, "show", "shop#request", "--json", "--show-results"))
    assert json.loads(shown["result"]) == {"body": "paid", "headers": [["content-type", "text/plain"]], "status": 201}
    typed(capsys, "resolve", KEY, "--result", "null")
    assert json.loads(typed(capsys, "show", KEY, "--json", "--show-results"))["result"] == "null"
    typed(capsys, "resolve", "shop#given up", "--unavailable", "--kept", "5")
    assert json.loads(typed(capsys, "show", "shop#given up", "--json"))["outcome"] == "unavailable"
    typed(capsys, "release", "shop#lapsed", "--max-clock-skew", "1")
    typed(capsys, "release", "shop#running", "--force")
    assert typed(capsys, "purge") == "1 expired record removed\n"
    refused = typed(capsys, "forget", "--prefix", "shop#", "--yes", code=1)
    assert "shop#forever is running" in refused
    assert "4 records forgotten" in refused
    assert typed(capsys, "forget", "--prefix", "shop#", "--yes", "--force") == "1 record forgotten\n"
    assert typed(capsys, "list") == ""


def test_a_store_that_cannot_be_used_is_told(
    path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for command in (["list"], ["show", KEY], ["release", KEY], ["purge"], ["doctor"]):
        assert "does not exist; make it with `aidem create-table`" in typed(capsys, *command, code=3)
    assert not path.exists()
    path.touch()
    assert "has no tables of records; make it with `aidem create-table`" in typed(capsys, "list", code=3)
    assert path.stat().st_size == 0
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


@pytest.mark.parametrize("store", ["redis:/shop:hunter2@host/0", "redis:shop:hunter2@host", "redi://shop:hunter2@host"])
def test_a_url_with_a_slip_in_it_does_not_show_its_password(store: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "--store", store]) in {2, 3}
    told = capsys.readouterr()
    assert "names" in told.err
    assert "hunter2" not in told.out + told.err


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
    for arguments in ('["o-1", "o-2"]', '{"order": 1}', "[]"):
        told = typed(capsys, "key", "shop_service:charge", "--args", arguments, code=2)
        assert "these arguments have no key: TypeError: shop_service.charge(): " in told


def test_doctor_tells_of_settings_that_endanger_the_promises(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = typed(capsys, "doctor")
    assert "SQLitePersistenceLayer: it can be reached and used\n    server: SQLite 3." in told
    assert "    journal mode: wal\n" in told
    store.chmod(0o666)
    told = typed(capsys, "doctor", code=1)
    assert told.count("writable by all users, who can forge results and drop claims; chmod o-w") == 1
    assert "\nproblem: " in told


AHEAD = """
from aidem.persistence import Diagnosis
from aidem.persistence.memory import MemoryPersistenceLayer

class Ahead(MemoryPersistenceLayer):
    async def clock_ahead_seconds(self):
        return 100.5

    async def diagnose(self):
        return Diagnosis({"answer": "42"}, ["it will end"])

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
    told = typed(capsys, "doctor", *store, code=1)
    assert told.endswith(", Ahead: it can be reached and used\n    answer: 42\nproblem: it will end\n")
    layer = importlib.import_module("ahead_layer").layer
    asyncio.run(abandoned(layer))
    assert "skew 100.5\n" in typed(capsys, "forget", KEY, *store)
    for command in (["resolve", KEY, "--unavailable"], ["release", KEY]):
        asyncio.run(abandoned(layer))
        assert "skew 101.5\n" in typed(capsys, *command, "--max-clock-skew", "1", *store)


async def abandoned(layer: Any, key: str = KEY) -> None:
    now = layer.clock() - 10
    await layer.forget(key)
    await layer.acquire(claim_of(key, now=now, kept_seconds=1000), now=layer.clock())
    put(layer, layer.records()[key].replace(in_progress_expiry_timestamp=1))


def test_create_table_makes_a_file(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert typed(capsys, "create-table") == "ready\n"
    assert typed(capsys, "list") == ""


# --- Progress ---------------------------------------------------------------------------------------------------------

SLOW = """
import asyncio, sys
import aidem.__main__
from aidem.persistence.memory import MemoryPersistenceLayer
from aidem.testing import claim_of

aidem.__main__.PROGRESS_SECONDS = 0.01

class Slow(MemoryPersistenceLayer):
    async def scan(self, *, prefix="", status=None, limit=None):
        now = self.clock()
        for number in range(3):
            yield claim_of(f"shop#{number}", now=now - number * 100, kept_seconds=1000, may_be_taken_over=False)
            for _ in range(20):
                await asyncio.sleep(0.01)

sys.modules["slow"] = type("module", (), {"layer": Slow()})
sys.exit(aidem.__main__.main(["--store", "slow:layer", *sys.argv[1:]]))
"""


def on_a_terminal(*arguments: str, term: str = "xterm", **streams: Any) -> tuple[str, str]:
    """Run a command whose stderr, at least, is a terminal; return what it wrote to its stdout and to the terminal."""
    reader, writer = pty.openpty()
    command = [sys.executable, "-c", SLOW, *arguments]
    environment = os.environ | {"TERM": term}
    with subprocess.Popen(
        command, text=True, stderr=writer, env=environment, **{"stdout": writer, **streams}
    ) as process:
        os.close(writer)
        written = b""
        with contextlib.suppress(OSError):  # how Linux says that nobody writes to the terminal any more
            while piece := os.read(reader, 4096):
                written += piece
        os.close(reader)
        output = "" if process.stdout is None else process.stdout.read()
    assert process.returncode in {0, 1}
    return output, written.decode().replace("\r\n", "\n")


def seen_at_the_end(written: str) -> list[str]:
    """Return the lines that are on the screen when everything was written."""
    return [line.split("\r")[-1].replace("\x1b[K", "") for line in written.split("\n")]


def test_a_long_scan_shows_its_progress_on_a_terminal() -> None:
    _, written = on_a_terminal("list", "--in-doubt")
    assert re.search(r"\r1 record read in \d+ s\x1b\[K", written)
    assert "\r3 records read in " in written
    lines = seen_at_the_end(written)
    assert [line for line in lines if not line.startswith("    in doubt since")] == ["shop#1", "shop#2", ""]
    assert "records read" not in "".join(lines)


def test_the_progress_is_not_in_what_a_pipe_gets() -> None:
    output, written = on_a_terminal("list", "--json", stdout=subprocess.PIPE)
    assert [json.loads(line)["key"] for line in output.splitlines()] == ["shop#0", "shop#1", "shop#2"]
    assert "records read" in written
    assert seen_at_the_end(written) == [""]
    _, written = on_a_terminal("forget", "--prefix", "shop#", stdout=subprocess.DEVNULL)
    assert "records read" in written


def test_a_terminal_that_cannot_erase_a_line_gets_no_progress() -> None:
    _, written = on_a_terminal("list", term="dumb")
    assert "shop#2" in written
    assert "\r" not in written
    assert "\x1b" not in written


def test_without_a_terminal_there_is_no_progress() -> None:
    command = [sys.executable, "-c", SLOW, "list"]
    environment = os.environ | {"TERM": "xterm"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, env=environment)
    assert (done.returncode, done.stderr) == (0, "")
    assert "read" not in done.stdout


def test_a_terminal_that_goes_away_does_not_end_the_command() -> None:
    reader, writer = pty.openpty()
    command = [sys.executable, "-c", SLOW, "list", "--json"]
    environment = os.environ | {"TERM": "xterm"}
    with subprocess.Popen(command, text=True, stderr=writer, stdout=subprocess.PIPE, env=environment) as process:
        os.close(writer)
        assert os.read(reader, 1)  # it has begun to show its progress
        os.close(reader)
        assert process.stdout is not None
        assert len(process.stdout.readlines()) == 3
        assert process.wait(SECONDS) == 0


# --- What goes wrong at a shell ---------------------------------------------------------------------------------------


def ran(command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Have a shell run a line, in which `aidem` is this one."""
    python = sys.executable
    return subprocess.run(
        ["bash", "-c", f'aidem() {{ {python} -m aidem "$@"; }}; {command}'],
        capture_output=True,
        text=True,
        env=os.environ | environment,
        timeout=SECONDS,
    )


@pytest.mark.parametrize(
    ("command", "code"),
    [
        ("aidem list | head -1; exit ${PIPESTATUS[0]}", 0),
        ("aidem list --json | true; exit ${PIPESTATUS[0]}", 0),
        ("aidem --help | true; exit ${PIPESTATUS[0]}", 0),
        ("aidem list >&-", 0),
        ("aidem list >&- 2>&- <&-", 0),
        ("aidem show nothing 2>&-", 1),
        ("aidem show nothing 2>&1 | true; exit ${PIPESTATUS[0]}", 1),
        ("aidem nonsense 2>&-", 2),
    ],
)
def test_a_pipe_that_closes_ends_the_command_quietly(store: Path, command: str, code: int) -> None:
    ended = ran(command)
    assert (ended.returncode, ended.stderr) == (code, "")


def test_an_output_that_cannot_be_written_is_told(store: Path) -> None:
    ended = ran("aidem list > /dev/full")
    assert (ended.returncode, ended.stderr) == (1, "aidem: the output cannot be written: No space left on device\n")


def test_a_terminal_without_letters_for_a_note_shows_them_escaped(path: Path) -> None:
    async def fill() -> None:
        async with SQLitePersistenceLayer(path) as layer:
            await layer.acquire(claim_of(KEY, now=layer.clock(), note="Bl\u00fcten \u2603"), now=layer.clock())

    asyncio.run(fill())
    ended = ran("aidem list", PYTHONIOENCODING="ascii", TERM="dumb")
    assert (ended.returncode, ended.stderr) == (0, "")
    assert r"note: Bl\xfcten \u2603" in ended.stdout


def test_a_pipe_of_the_store_that_closes_is_a_failure_of_the_store(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = FAILING.replace("FAILURE", "BrokenPipeError('of the store')")
    (path.parent / "piped_layer.py").write_text(text)
    told = typed(capsys, "show", KEY, "--store", "piped_layer:layer", code=3)
    assert told == "aidem: Failing raised BrokenPipeError: of the store\n"


def test_a_layer_that_cannot_be_closed_is_a_failure_of_the_store(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = FAILING.replace("def get(self, key)", "async def aclose(self)").replace("FAILURE", "OSError('still in use')")
    (path.parent / "unclosed_layer.py").write_text(text)
    told = typed(capsys, "list", "--store", "unclosed_layer:layer", code=3)
    assert told == "aidem: Failing raised OSError: still in use\n"


FAILING = """
from aidem.persistence.memory import MemoryPersistenceLayer

class Failing(MemoryPersistenceLayer):
    def get(self, key):
        raise FAILURE

layer = Failing()
"""


def test_a_module_that_cannot_be_imported_is_told(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number, (text, sentence) in enumerate(
        (
            ("raise RuntimeError('no database')", "cannot be imported: RuntimeError: no database"),
            ("import sys; sys.exit(0)", "cannot be imported: SystemExit: 0"),
            ("1 +", "cannot be imported: SyntaxError"),
            ("layer = None", "is no persistence layer"),
        )
    ):
        (path.parent / f"broken_{number}.py").write_text(text)
        for arguments in (["list", "--store", f"broken_{number}:layer"], ["key", f"broken_{number}:layer.call"]):
            assert "cannot be imported" in typed(capsys, *arguments, code=2) or arguments[0] == "list"
        assert sentence in typed(capsys, "list", "--store", f"broken_{number}:layer", code=2)


def test_a_store_can_be_named_before_the_command(
    store: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AIDEM_PERSISTENCE")
    assert "shop#done" in typed(capsys, "--store", f"sqlite:///{store}", "show", "shop#done")
    assert "shop#done" in typed(capsys, "--store", "memory://", "show", "shop#done", "--store", f"sqlite:///{store}")


def test_records_that_others_drop_meanwhile_are_no_failure(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (path.parent / "emptied_layer.py").write_text(EMPTIED)
    store = ["--store", "emptied_layer:layer"]
    typed(capsys, "list", *store)
    layer = importlib.import_module("emptied_layer").layer
    for key in ("shop#1", "shop#2"):
        asyncio.run(abandoned(layer, key))
    assert typed(capsys, "forget", "--prefix", "shop#", "--yes", *store) == "1 record forgotten\n"


EMPTIED = """
from aidem.persistence.memory import MemoryPersistenceLayer

class Emptied(MemoryPersistenceLayer):
    def get(self, key):
        if key == "shop#2":
            self._records.pop(key, None)
        return super().get(key)

layer = Emptied()
"""


@pytest.mark.server
def test_ctrl_c_ends_a_command_that_waits_for_its_store(tmp_path: Path) -> None:
    with started("valkey") as server, contextlib.ExitStack() as stack:
        server.pause()
        stack.callback(server.resume)
        command = [sys.executable, "-c", INTERRUPTED, "list", "--store", server.url]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as waiting:
            assert waiting.stdout is not None
            assert waiting.stdout.readline() == "waiting\n"
            waiting.send_signal(signal.SIGINT)
            assert waiting.communicate(timeout=SECONDS) == ("", "")
            assert waiting.returncode == 130


INTERRUPTED = """
import asyncio, signal, sys
from functools import partial
from aidem.__main__ import main
from aidem.persistence.redis import RedisPersistenceLayer

signal.signal(signal.SIGINT, signal.default_int_handler)
scan = RedisPersistenceLayer.scan

async def telling(*args, **options):
    asyncio.get_running_loop().call_later(0.1, partial(print, "waiting", flush=True))
    async for record in scan(*args, **options):
        yield record

class Telling(RedisPersistenceLayer):
    scan = telling

sys.modules["telling"] = type("module", (), {"layer": Telling(sys.argv[-1])})
sys.exit(main([*sys.argv[1:-1], "telling:layer"]))
"""


@pytest.mark.server
def test_a_server_that_does_not_answer_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    with started("valkey") as server, contextlib.ExitStack() as stack:
        server.pause()
        stack.callback(server.resume)
        for command in (["list"], ["resolve", KEY, "--unavailable"]):
            told = typed(capsys, *command, "--store", server.url, code=3)
            assert "cannot be reached (no answer within 5 s" in told
            assert told.count("\n") == 1


@pytest.mark.server
def test_a_table_that_is_missing_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    with postgres.started() as server:
        for command in (["list"], ["show", KEY], ["release", KEY], ["purge"], ["doctor"]):
            told = typed(capsys, *command, "--store", server.url, code=3)
            assert "table 'aidem_records' does not exist" in told
            assert "`aidem create-table`" in told
            assert r"\n" not in told


@pytest.mark.server
@pytest.mark.parametrize("database", EMULATORS[:1], indirect=True)
def test_a_table_that_is_missing_in_dynamodb_is_told(database: Database, capsys: pytest.CaptureFixture[str]) -> None:
    for command in (["list"], ["show", KEY], ["release", KEY], ["forget", KEY], ["doctor"]):
        told = typed(capsys, *command, "--store", "dynamodb://no-such-table", code=3)
        assert "`aidem create-table`" in told
    assert "Invalid endpoint" in typed(capsys, "list", "--store", "dynamodb://table?endpoint=x", code=3)


def test_ctrl_c_ends_the_command(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (path.parent / "interrupted_layer.py").write_text("raise KeyboardInterrupt")
    assert typed(capsys, "list", "--store", "interrupted_layer:layer", code=130) == ""


def test_an_instant_beyond_the_calendar_is_shown_as_it_is(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    async def fill() -> None:
        layer: Any = open_persistence_layer(f"sqlite:///{path}")
        async with layer:
            now = layer.clock()
            await layer.acquire(claim_of(KEY, now=now, kept_seconds=10**15), now=now)

    asyncio.run(fill())
    assert json.loads(typed(capsys, "show", KEY, "--json"))["expires_at"].isdecimal()
