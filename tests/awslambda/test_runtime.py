"""Handlers under Lambda's own runtime client, against a runtime API that is served here, with real stores."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import signal
import ssl
import subprocess
import time
from collections.abc import AsyncGenerator, Iterator, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from aidem._runtime import lambda_loop
from aidem.awslambda import lambda_handler
from tests.support.aws_servers import Database
from tests.support.awslambda.runtime import Answer, Environment, environment
from tests.support.proxy import Proxy
from tests.support.servers import RedisServer, started

pytestmark = [pytest.mark.server, pytest.mark.timeout(120, func_only=True)]

POLL_SECONDS = 0.01
PATIENCE_SECONDS = 50.0
HANGING = {"hangs_seconds": 3600.0}


@dataclass
class Account:
    """A store behind a proxy, the log of the effects, and the environments in which the function runs."""

    proxy: Proxy
    variables: dict[str, str]
    directory: Path
    _numbers: Iterator[int] = field(default_factory=itertools.count)

    def environment(
        self, handler: str, variables: Mapping[str, str] | None = None, *, runtime: str = "awslambdaric"
    ) -> AbstractAsyncContextManager[Environment]:
        output = self.directory / f"output-{next(self._numbers)}"
        return environment(handler, {**self.variables, **(variables or {})}, output, runtime=runtime)

    @property
    def log(self) -> Path:
        return Path(self.variables["AIDEM_TEST_LOG"])

    def effects(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.log.read_bytes().splitlines()]

    async def effect(self, order: object) -> dict[str, Any]:
        """Wait for the effect of an order; the last, if there are several."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while time.monotonic() < deadline:
            for effect in reversed(self.effects()):
                if effect["order"] == order:
                    return effect
            await asyncio.sleep(POLL_SECONDS)
        raise AssertionError(f"{order!r} had no effect")


@pytest.fixture(scope="module")
def redis() -> Iterator[RedisServer]:
    with started("redis") as server:
        yield server


@pytest.fixture(params=["redis", "dynamodb"])
async def account(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncGenerator[Account]:
    log = tmp_path / "effects"
    log.touch()
    variables = {"AIDEM_TEST_LOG": str(log), "AWS_LAMBDA_FUNCTION_NAME": "pay"}
    async with contextlib.AsyncExitStack() as stack:
        if request.param == "redis":
            server: RedisServer = request.getfixturevalue("redis")
            proxy = await stack.enter_async_context(Proxy.to(server.port))
            variables["AIDEM_TEST_LAYER"] = f"redis://127.0.0.1:{proxy.port}/0"
        else:
            database = Database(request.getfixturevalue("ministack_url"))
            proxy = await stack.enter_async_context(Proxy.to(database.port))
            variables |= database.environment | {"AWS_ENDPOINT_URL_DYNAMODB": f"http://127.0.0.1:{proxy.port}"}
            variables["AIDEM_TEST_LAYER"] = f"dynamodb://{await asyncio.to_thread(create_table, database)}"
        yield Account(proxy, variables, tmp_path)


def create_table(database: Database) -> str:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in database.environment.items():
            patch.setenv(name, value)
        return database.create_table()


PAIRS = pytest.mark.parametrize(
    ("account", "handler"), [("redis", "sync_handler"), ("dynamodb", "async_handler")], indirect=["account"]
)
"""Each handler and each store once."""


@pytest.fixture
def order(request: pytest.FixtureRequest) -> str:
    """An order that no other test knows: the Redis server is shared."""
    return f"{request.node.name}-{time.monotonic_ns()}"


@PAIRS
async def test_the_same_event_has_one_effect_and_one_result_in_all_environments(
    handler: str, account: Account, order: str
) -> None:
    async with account.environment(handler) as first, account.environment(handler) as second:
        answer = await first.invoke({"order": order})
        assert answer.result["order"] == order
        assert await first.invoke({"order": order}) == answer
        assert await second.invoke({"order": order}) == answer
    assert len(account.effects()) == 1


@PAIRS
async def test_a_handler_that_raises_is_reported_and_runs_again(handler: str, account: Account, order: str) -> None:
    async with account.environment(handler) as lambda_:
        assert await lambda_.invoke({"order": order, "fails": True}) == Answer(error_type="ValueError")
        assert (await lambda_.invoke({"order": order})).result["order"] == order
    assert len(account.effects()) == 1


@PAIRS
async def test_while_an_environment_works_on_an_event_another_is_refused(
    handler: str, account: Account, order: str
) -> None:
    async with account.environment(handler) as first, account.environment(handler) as second:
        first.send({"order": order, **HANGING})
        await account.effect(order)
        assert await second.invoke({"order": order}) == Answer(error_type="IdempotencyAlreadyInProgressError")
    assert len(account.effects()) == 1


@PAIRS
async def test_a_function_that_was_killed_at_its_deadline_runs_again_at_once(
    handler: str, account: Account, order: str
) -> None:
    async with account.environment(handler) as first, account.environment(handler) as second:
        await first.reaches(first.api.ready)
        await second.reaches(second.api.ready)
        invocation = first.send({"order": order, **HANGING}, deadline_seconds=3.0)
        killed = await account.effect(order)
        assert killed["lease_end"] == pytest.approx(max(invocation.deadline, killed["at"] + 1.0), abs=1.0)
        while time.time() < killed["lease_end"] + 0.01:  # noqa: ASYNC110 - the clock is that of the store and of Lambda
            await asyncio.sleep(POLL_SECONDS)
        await first.kill()
        assert not invocation.answer.done()
        answer = await second.invoke({"order": order})
        assert answer.result["order"] == order
        assert answer.result["owner"] != killed["owner"]
        assert await second.invoke({"order": order}) == answer
    assert len(account.effects()) == 2


@PAIRS
async def test_a_frozen_environment_goes_on_although_its_connections_are_dead(
    handler: str, account: Account, order: str
) -> None:
    async with account.environment(handler) as lambda_:
        first = await lambda_.invoke({"order": order})
        connected = account.proxy.connections
        assert account.proxy.open_connections > 0
        lambda_.freeze()
        account.proxy.cut()
        while account.proxy.open_connections:  # noqa: ASYNC110
            await asyncio.sleep(POLL_SECONDS)
        lambda_.thaw()
        assert (await lambda_.invoke({"order": f"{order}-2"})).result["order"] == f"{order}-2"
        assert account.proxy.connections > connected
        assert await lambda_.invoke({"order": order}) == first
    assert len(account.effects()) == 2


async def test_a_store_that_is_down_during_init_does_no_harm_once_it_is_up(account: Account, order: str) -> None:
    account.proxy.refuse()
    async with account.environment("async_handler") as lambda_:
        await lambda_.reaches(lambda_.api.ready)
        assert account.proxy.connections > 0
        assert "could not be opened yet" in lambda_.output.read_text()
        account.proxy.heal()
        assert (await lambda_.invoke({"order": order})).result["order"] == order
    assert lambda_.api.init_error is None


async def test_a_function_that_is_terminated_gives_its_key_back(account: Account, order: str) -> None:
    async with account.environment("async_handler") as first, account.environment("async_handler") as second:
        invocation = first.send({"order": order, **HANGING})
        await account.effect(order)
        first.process.terminate()
        assert await asyncio.wait_for(first.process.wait(), PATIENCE_SECONDS) == 128 + signal.SIGTERM
        assert not invocation.answer.done()
        assert (await second.invoke({"order": order})).result["order"] == order
    assert len(account.effects()) == 2


# --- Managed instances ------------------------------------------------------------------------------------------------

WORKERS = 3


@PAIRS
async def test_the_processes_of_a_managed_instance_work_side_by_side_on_one_record_per_event(
    handler: str, account: Account, order: str
) -> None:
    several = {"AWS_LAMBDA_MAX_CONCURRENCY": str(WORKERS), "AIDEM_TEST_WAIT_SECONDS": "60"}
    async with account.environment(handler, several) as lambda_:
        events = [{"order": f"{order}-{number}", "together": WORKERS} for number in range(WORKERS)]
        answers = await asyncio.gather(*map(lambda_.invoke, events))
        assert len({answer.result["pid"] for answer in answers}) == WORKERS
        assert await asyncio.gather(*map(lambda_.invoke, events)) == answers
        same = await asyncio.gather(*[lambda_.invoke({"order": order, "hangs_seconds": 0.3}) for _ in range(WORKERS)])
        assert len({answer.result["owner"] for answer in same}) == 1
    assert len(account.effects()) == WORKERS + 1


# --- SnapStart --------------------------------------------------------------------------------------------------------

SNAP_START = {"AWS_LAMBDA_INITIALIZATION_TYPE": "snap-start"}


@PAIRS
async def test_nothing_is_connected_while_a_snapshot_is_taken(handler: str, account: Account, order: str) -> None:
    async with account.environment(handler, {**SNAP_START, "AIDEM_TEST_PRIMES": handler}) as lambda_:
        await lambda_.reaches(lambda_.api.snapshot)
        assert account.proxy.connections > 0
        while account.proxy.open_connections:  # noqa: ASYNC110 - they are closed, and the proxy has yet to hear of it
            await asyncio.sleep(POLL_SECONDS)
        assert [effect["order"] for effect in account.effects()] == [str(account.log)]
        connected = account.proxy.connections
        lambda_.api.restored.set()
        assert (await lambda_.invoke({"order": order})).result["order"] == order
        assert account.proxy.connections > connected


@PAIRS
async def test_environments_restored_from_one_snapshot_have_connections_and_claims_of_their_own(
    handler: str, account: Account, order: str
) -> None:
    variables = {**SNAP_START, "AIDEM_TEST_PRIMES": handler, "AIDEM_TEST_WAIT_SECONDS": "60"}
    async with account.environment(handler, variables, runtime="tests.support.awslambda.cloning_runtime") as lambda_:
        await lambda_.reaches(lambda_.api.snapshot)
        connected = account.proxy.connections
        lambda_.api.restored.set()
        # Each waits for the effects of all, so there are as many processes as clones.
        events = [{"order": f"{order}-{number}", "together": 1 + WORKERS} for number in range(WORKERS)]
        answers = await asyncio.gather(*map(lambda_.invoke, events))
        assert len({answer.result["pid"] for answer in answers}) == WORKERS
        assert len({effect["owner"] for effect in account.effects()}) == WORKERS + 1
        assert account.proxy.connections >= connected + WORKERS
        same = await asyncio.gather(*[lambda_.invoke({"order": order, "hangs_seconds": 0.3}) for _ in range(WORKERS)])
        assert len({answer.result["owner"] for answer in same}) == 1
    assert len(account.effects()) == 1 + WORKERS + 1


# --- TLS --------------------------------------------------------------------------------------------------------------


async def test_a_tls_connection_that_was_closed_while_the_loop_stood_still_is_found_out_before_it_is_used(
    tmp_path: Path,
) -> None:
    command = "req -x509 -newkey rsa:2048 -nodes -subj /CN=localhost -keyout key.pem -out certificate.pem"
    await asyncio.to_thread(
        subprocess.run, ["openssl", *command.split()], cwd=tmp_path, check=True, capture_output=True
    )
    ours = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    ours.load_cert_chain(tmp_path / "certificate.pem", tmp_path / "key.pem")
    accepted: asyncio.Queue[asyncio.StreamWriter] = asyncio.Queue()

    async def accept(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        accepted.put_nowait(writer)

    server = await asyncio.start_server(accept, "127.0.0.1", 0, ssl=ours)
    client = TlsClient(server.sockets[0].getsockname()[1])
    assert await asyncio.to_thread(client.call, None, None) is True
    writer = await accepted.get()
    writer.transport.abort()
    with contextlib.suppress(OSError):
        await writer.wait_closed()
    assert await asyncio.to_thread(client.call, None, None) is False
    server.close()
    await asyncio.to_thread(lambda_loop.close)


class TlsClient(asyncio.Protocol):
    """Connects once, and says in each call whether it still is."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.is_connected = False
        self.call = lambda_handler(self.look)

    async def look(self, event: None, context: None) -> bool:
        if not hasattr(self, "transport"):
            theirs = ssl.create_default_context()
            theirs.check_hostname, theirs.verify_mode = False, ssl.CERT_NONE
            loop = asyncio.get_running_loop()
            self.transport, _ = await loop.create_connection(lambda: self, "127.0.0.1", self.port, ssl=theirs)
        return self.is_connected

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.is_connected = True

    def connection_lost(self, exc: Exception | None) -> None:
        self.is_connected = False
