"""DynamoDB for tests: two emulators that have nothing in common, or whatever `AIDEM_TEST_DYNAMODB_URL` names."""

from __future__ import annotations

import contextlib
import os
import secrets
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.support.servers import free_port

START_SECONDS = 60
ENVIRONMENTS = Path(os.environ.get("NOX_ENVDIR", Path(__file__).parents[2] / ".nox"))
OTHER_URL = os.environ.get("AIDEM_TEST_DYNAMODB_URL")
EMULATORS = ("other",) if OTHER_URL else ("moto", "ministack")

# Between moto's look at a condition and its write another thread may write, so it gets one thread.
ATOMIC_MOTO = """
import sys
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import run_simple

run_simple("127.0.0.1", int(sys.argv[1]), DomainDispatcherApplication(create_backend_app), threaded=False)
"""

CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "testing",
    "AWS_SECRET_ACCESS_KEY": "testing",
    "AWS_DEFAULT_REGION": "eu-central-1",
    "AWS_EC2_METADATA_DISABLED": "true",
    "AWS_CA_BUNDLE": str(Path(__file__).parents[1] / "data" / "ca.pem"),  # one certificate, for one of many is read
    "AWS_CONFIG_FILE": os.devnull,
    "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
}


@dataclass
class Database:
    """A DynamoDB, and what tests ask of it by a client that is not under test.

    Attributes:
        url: Its endpoint.
        environment: What a process needs to reach it.
    """

    url: str
    environment: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.environment = {**({} if OTHER_URL else CREDENTIALS), "AWS_ENDPOINT_URL_DYNAMODB": self.url}

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2].rstrip("/"))

    @property
    def client(self) -> Any:
        """The synchronous client of AWS."""
        return client_of(self.url)

    def create_table(self, key_attr: str = "id", sort_key_attr: str | None = None) -> str:
        name = f"aidem-{secrets.token_hex(8)}"
        keys = {"HASH": key_attr} | ({"RANGE": sort_key_attr} if sort_key_attr else {})
        self.client.create_table(
            TableName=name,
            KeySchema=[{"AttributeName": attr, "KeyType": kind} for kind, attr in keys.items()],
            AttributeDefinitions=[{"AttributeName": attr, "AttributeType": "S"} for attr in keys.values()],
            BillingMode="PAY_PER_REQUEST",
        )
        self.client.get_waiter("table_exists").wait(TableName=name, WaiterConfig={"Delay": 1})
        return name

    def item(self, table: str, key: str = "key") -> Any:
        """Return an item of a table with a simple key, as it is on the wire."""
        return self.client.get_item(TableName=table, Key={"id": {"S": key}}, ConsistentRead=True).get("Item")

    def items(self, table: str) -> list[Any]:
        items: list[Any] = self.client.scan(TableName=table, ConsistentRead=True)["Items"]
        return items

    def put(self, table: str, **attributes: dict[str, Any]) -> None:
        self.client.put_item(TableName=table, Item=attributes)


@cache
def client_of(url: str) -> Any:
    """Return AWS's own client of a database; it is made once, as that takes long."""
    import boto3

    return boto3.client("dynamodb", endpoint_url=url)


@pytest.fixture(scope="session")
def moto_url() -> Iterator[str]:
    port = free_port()
    with started([sys.executable, "-c", ATOMIC_MOTO, str(port)], port) as url:
        yield url


@pytest.fixture(scope="session")
def ministack_url() -> Iterator[str]:
    port = free_port()
    python = python_beside_servers()
    environment = {"BIND_HOST": "127.0.0.1", "GATEWAY_PORT": str(port)}
    with started([python, "-m", "ministack"], port, environment) as url:
        yield url


@pytest.fixture(params=EMULATORS)
def database(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Database:
    """Point the AWS environment at each of the emulators in turn."""
    url = OTHER_URL or request.getfixturevalue(f"{request.param}_url")
    database = Database(url)
    for name, value in database.environment.items():
        monkeypatch.setenv(name, value)
    return database


@pytest.fixture
def table(database: Database) -> str:
    """A table of its own for a test, with a simple key."""
    return database.create_table()


@contextlib.contextmanager
def started(command: list[str], port: int, environment: dict[str, str] | None = None) -> Iterator[str]:
    """Run a server until the end of the block; it answers when the block begins."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "COVERAGE_"))}
    url = f"http://127.0.0.1:{port}"
    with subprocess.Popen(
        command, env=clean | (environment or {}), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as server:
        try:
            wait_until_it_answers(url, server)
            yield url
        finally:
            server.kill()


def wait_until_it_answers(url: str, server: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if server.poll() is not None:
            break
        try:
            urllib.request.urlopen(url, timeout=START_SECONDS).close()
        except urllib.error.HTTPError as answer:
            answer.close()
        except OSError:
            time.sleep(0.05)
            continue
        return
    pytest.fail(f"{server.args!r} did not start; run it by hand to see why")


def python_beside_servers() -> str:
    """Return an interpreter that has what cannot be installed beside the rest: ministack and arq, which pin clients."""
    python = ENVIRONMENTS / "servers" / "bin" / "python"
    assert python.exists(), "these tests need an environment of their own: run `nox -s servers`"
    return str(python)
