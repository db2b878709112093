"""The sessions in docs/operations.md are typed as they stand there, on four stores, and have the output shown there."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from aidem.persistence import PersistenceLayer, open_persistence_layer
from tests.support import aws_servers, postgres
from tests.support.aws_servers import EMULATORS, Database
from tests.support.servers import started

pytestmark = pytest.mark.timeout(180)  # a session is a dozen processes

database, moto_url, ministack_url = aws_servers.database, aws_servers.moto_url, aws_servers.ministack_url

PAGE = Path(__file__).parents[1] / "docs" / "operations.md"
SECONDS = 60

SHOP = """
import asyncio, os, sys
import httpx
from aidem import IdempotencyConfig, idempotent_function
from aidem.asgi import IdempotencyMiddleware
from aidem.persistence import PersistenceLayer, open_persistence_layer

store = open_persistence_layer(os.environ["AIDEM_PERSISTENCE"])
lease_seconds = float(os.environ.get("LEASE_SECONDS", "1"))
at_most_once = IdempotencyConfig(
    on_abandoned="raise", lease_seconds=lease_seconds, note=lambda arguments: f"order {arguments['order_id']}"
)

@idempotent_function(persistence_store=store, config=at_most_once, key_prefix="shop.charge")
async def charge(order_id: str) -> dict[str, int]:
    print("running", flush=True)
    await asyncio.sleep(60)

async def app(scope, receive, send):
    await charge.__wrapped__("")

async def post(key):
    config = IdempotencyConfig(
        on_abandoned="raise", lease_seconds=lease_seconds, note=lambda scope: f"POST {scope['path']}"
    )
    guarded = IdempotencyMiddleware(app, persistence_store=store, config=config, key_prefix="shop", scope=None)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(guarded), base_url="http://shop") as client:
        response = await client.post("/charges", headers={"Idempotency-Key": key}, json={"order_id": "o-1"})
        print(response.status_code, response.text)

if __name__ == "__main__":
    what, name = sys.argv[1:]
    answer = asyncio.run(post(name) if what == "post" else charge(name))
    if answer is not None:
        print(answer)
"""


def session(store: str) -> list[tuple[str, str]]:
    """Return the commands of the session on a store, each with its output, as the page has them."""
    section = PAGE.read_text("utf-8").partition(f"\n### On {store}\n")[2].partition("\n#")[0]
    blocks = re.findall(r"```console\n(.*?)```", section, re.DOTALL)
    typed = re.split(r"^\$ ", "".join(blocks).replace("\\\n", ""), flags=re.MULTILINE)[1:]
    return [(command, output) for command, _, output in (each.partition("\n") for each in typed)]


def normalised(output: str, *, numbers: bool) -> str:
    """Return an output without its time and line breaks and, if asked, without what differs between machines."""
    output = re.sub(r"\s+", " ", output)
    output = re.sub(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", "TIME", output)
    if numbers:
        output = re.sub(r"records-[0-9a-f]+", "records", output)
        output = re.sub(r"\d[\d.]*[KMG]?B?", "N", output)
    return output


class Shop:
    """A directory with a shop, whose worker is killed."""

    def __init__(self, directory: Path, store: str) -> None:
        (directory / "shop.py").write_text(SHOP)
        self._directory = directory
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        self._environment = os.environ | {"PATH": path, "AIDEM_PERSISTENCE": store}

    def typed(self, command: str) -> str:
        done = subprocess.run(
            ["bash", "-c", command],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=self._directory,
            env=self._environment,
            timeout=SECONDS,
        )
        return done.stdout

    @contextlib.contextmanager
    def worker(self, what: str, name: str, *, lease_seconds: float = 1) -> Iterator[None]:
        environment = self._environment | {"LEASE_SECONDS": str(lease_seconds)}
        command = [sys.executable, "shop.py", what, name]
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, text=True, cwd=self._directory, env=environment
        ) as worker:
            try:
                assert worker.stdout is not None
                assert worker.stdout.readline() == "running\n"
                yield
            finally:
                worker.kill()

    def answers_as_the_page_shows(self, store: str) -> None:
        (exported, _), *commands = session(store)
        scheme = self._environment["AIDEM_PERSISTENCE"].partition(":")[0]
        assert exported.startswith(f"export AIDEM_PERSISTENCE='{scheme}:")
        assert len(commands) > 2
        self._until_in_doubt()
        variables = ""
        for command, output in commands:
            if command.startswith("KEY="):
                variables = f"{command}\n"
                continue
            is_doctor = command == "aidem doctor"
            told = self.typed(variables + command)
            assert normalised(told, numbers=is_doctor) == normalised(output, numbers=is_doctor), command

    def _until_in_doubt(self) -> None:
        deadline = time.monotonic() + SECONDS
        while not self.typed("aidem list --in-doubt --json"):
            assert time.monotonic() < deadline, "the lease must lapse"
        if self._environment["AIDEM_PERSISTENCE"].startswith("dynamodb"):
            time.sleep(1.1)  # a clock told in whole seconds may be so far behind, which is added to leases


def test_the_session_on_sqlite(tmp_path: Path) -> None:
    shop = Shop(tmp_path, f"sqlite:///{tmp_path}/records.sqlite3")
    with shop.worker("charge", "o-1"):
        pass
    shop.answers_as_the_page_shows("SQLite")


@pytest.mark.server
def test_the_session_on_redis(tmp_path: Path) -> None:
    with started("redis", "--appendonly", "yes") as server:
        shop = Shop(tmp_path, server.url)
        with shop.worker("post", "8e03978e"):
            pass
        shop.answers_as_the_page_shows("Redis")


@pytest.mark.server
def test_the_session_on_postgresql(tmp_path: Path) -> None:
    with postgres.started() as server:
        shop = Shop(tmp_path, server.url)
        assert shop.typed("aidem create-table") == "ready\n"
        with shop.worker("charge", "o-1"):
            pass
        with shop.worker("charge", "o-2", lease_seconds=60):
            shop.answers_as_the_page_shows("PostgreSQL")


@pytest.mark.server
@pytest.mark.parametrize("database", EMULATORS[-1:], indirect=True)
def test_the_session_on_dynamodb(tmp_path: Path, database: Database) -> None:
    shop = Shop(tmp_path, f"dynamodb://records-{secrets.token_hex(8)}?key_attr=pk&sort_key_attr=sk")
    assert shop.typed("aidem create-table") == "ready\n"
    with shop.worker("charge", "o-1"):
        pass
    shop.answers_as_the_page_shows("DynamoDB")


def test_the_url_of_every_session_names_a_layer() -> None:
    for store in ("SQLite", "Redis", "PostgreSQL", "DynamoDB"):
        exported, _ = session(store)[0]
        assert isinstance(open_persistence_layer(exported.partition("'")[2].rstrip("'")), PersistenceLayer)
