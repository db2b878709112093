"""Which client a layer asks: whose it is, how it is set up, and that it is closed."""

from __future__ import annotations

import asyncio
import gc
import os
import subprocess
import sys
import weakref
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import boto3
import pytest
from aiobotocore.config import AioConfig
from aiobotocore.session import get_session
from botocore.config import Config

from aidem._distribution import __version__
from aidem._rules.lifecycle import Blocked, Claimed
from aidem.exceptions import IdempotencyPersistenceConfigError
from aidem.persistence.dynamodb import DynamoDBPersistenceLayer
from aidem.testing import claim_of
from tests.support.aws_servers import Database
from tests.support.proxy import Proxy

pytestmark = [pytest.mark.server, pytest.mark.timeout(60, func_only=True)]

ROOT = Path(__file__).parents[3]


@dataclass
class CountingSession:
    """Makes clients as an `aioboto3.Session` does, and counts those that are made and still open."""

    made: int = 0
    open: int = 0
    config: Any = None
    gate: asyncio.Event | None = None
    errors: list[Exception] = field(default_factory=list)

    def client(self, service: str, *, config: Any) -> CountedClient:
        self.config = config
        return CountedClient(self)


@dataclass
class CountedClient:
    """A context manager as those of AWS are: no generator, which the loop would close on its own."""

    session: CountingSession
    context: Any = None

    async def __aenter__(self) -> Any:
        if self.session.gate is not None:
            await self.session.gate.wait()
        if self.session.errors:
            raise self.session.errors.pop()
        self.context = get_session().create_client("dynamodb", config=self.session.config)
        client = await self.context.__aenter__()
        self.session.made += 1
        self.session.open += 1
        return client

    async def __aexit__(self, *error: object) -> None:
        await self.context.__aexit__(*error)
        self.session.open -= 1


class SocketlessClient:
    """A client without anything that must be closed."""

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> None:
        """Nothing to close."""

    async def get_item(self, **_request: Any) -> dict[str, Any]:
        return {}


class SocketlessSession:
    """Makes such clients, and sees which of them still exist."""

    def __init__(self) -> None:
        self.clients = weakref.WeakSet[SocketlessClient]()

    def client(self, service: str, *, config: Any) -> SocketlessClient:
        client = SocketlessClient()
        self.clients.add(client)
        return client


@pytest.fixture
def session() -> CountingSession:
    return CountingSession()


@pytest.fixture
def layer(table: str, session: CountingSession) -> DynamoDBPersistenceLayer:
    return DynamoDBPersistenceLayer(table, session=session)


async def until(session: CountingSession, *, still_open: int) -> None:
    async with asyncio.timeout(30):
        while session.open != still_open:  # noqa: ASYNC110 - in the hands of the garbage collector
            await asyncio.sleep(0.001)


# --- One for each loop ------------------------------------------------------------------------------------------------


async def test_nothing_is_made_before_the_first_use_and_then_one_client_for_all_tasks(
    layer: DynamoDBPersistenceLayer, session: CountingSession
) -> None:
    assert session.made == 0
    await asyncio.gather(*(layer.get("key") for _ in range(20)))
    await layer.get("key")
    assert (session.made, session.open) == (1, 1)
    await layer.aclose()
    assert session.open == 0


def test_every_asyncio_run_has_a_client_that_it_closes(
    layer: DynamoDBPersistenceLayer, session: CountingSession
) -> None:
    for number in range(1, 4):
        asyncio.run(layer.get("key"))
        assert (session.made, session.open) == (number, 0)
    gc.collect()


def test_a_loop_that_is_kept_keeps_its_client(layer: DynamoDBPersistenceLayer, session: CountingSession) -> None:
    with asyncio.Runner() as kept:
        kept.run(layer.get("key"))
        asyncio.run(layer.get("key"))
        kept.run(layer.get("key"))
        assert (session.made, session.open) == (2, 1)
    assert session.open == 0


def test_a_layer_forgets_a_loop_that_was_closed_without_its_generators() -> None:
    session = SocketlessSession()
    layer = DynamoDBPersistenceLayer("table", session=session)
    loop = asyncio.new_event_loop()
    loop.run_until_complete(layer.get("key"))
    loop.close()
    assert len(session.clients) == 1
    asyncio.run(layer.get("key"))
    gc.collect()
    assert len(session.clients) == 0


async def test_a_layer_that_is_dropped_has_its_client_closed(table: str, session: CountingSession) -> None:
    layer = DynamoDBPersistenceLayer(table, session=session)
    await layer.get("key")
    del layer
    gc.collect()
    await until(session, still_open=0)


def test_a_layer_that_is_dropped_after_its_loop_leaves_nothing() -> None:
    session = SocketlessSession()
    layer = DynamoDBPersistenceLayer("table", session=session)
    loop = asyncio.new_event_loop()
    loop.run_until_complete(layer.get("key"))
    loop.close()
    del layer
    gc.collect()
    assert len(session.clients) == 0


async def test_one_who_gives_up_leaves_the_making_to_the_next(
    layer: DynamoDBPersistenceLayer, session: CountingSession
) -> None:
    session.gate = asyncio.Event()
    first, second = (asyncio.ensure_future(layer.get("key")) for _ in range(2))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    first.cancel()
    await asyncio.wait([first])
    session.gate.set()
    assert await second is None
    await layer.get("key")
    assert session.made == 1
    await layer.aclose()
    assert session.open == 0


async def test_a_failure_to_make_a_client_is_not_kept(
    layer: DynamoDBPersistenceLayer, session: CountingSession
) -> None:
    session.errors = [OSError("no network yet")]
    with pytest.raises(Exception, match="could not be reached"):
        await layer.get("key")
    assert await layer.get("key") is None
    await layer.aclose()


async def test_closing_waits_for_those_who_use_the_client(
    layer: DynamoDBPersistenceLayer, session: CountingSession
) -> None:
    session.gate = asyncio.Event()
    users = [asyncio.ensure_future(layer.get("key")) for _ in range(3)]
    await asyncio.sleep(0)
    closing = asyncio.ensure_future(layer.aclose())
    await asyncio.sleep(0)
    session.gate.set()
    assert await asyncio.gather(*users, closing) == [None, None, None, None]
    assert (session.made, session.open) == (1, 0)
    assert await layer.get("key") is None
    assert (session.made, session.open) == (2, 1)
    await layer.aclose()
    assert session.open == 0


async def test_who_gives_up_closing_has_it_closed_all_the_same(
    layer: DynamoDBPersistenceLayer, session: CountingSession
) -> None:
    session.gate = asyncio.Event()
    user = asyncio.ensure_future(layer.get("key"))
    await asyncio.sleep(0)
    closing = asyncio.ensure_future(layer.aclose())
    await asyncio.sleep(0)
    closing.cancel()
    await asyncio.wait([closing])
    assert closing.cancelled()
    session.gate.set()
    await user
    assert session.made == 1
    await until(session, still_open=0)


def test_a_loop_that_ends_while_the_client_is_closed_leaves_nothing(
    layer: DynamoDBPersistenceLayer, session: CountingSession
) -> None:
    async def leave_everything() -> None:
        await layer.get("key")
        tasks = [asyncio.ensure_future(layer.get("key")), asyncio.ensure_future(layer.aclose())]
        await asyncio.sleep(0)
        assert not any(task.done() for task in tasks)

    asyncio.run(leave_everything())
    gc.collect()
    assert (session.made, session.open) == (1, 0)


async def test_a_client_made_while_another_is_closed_is_kept(
    layer: DynamoDBPersistenceLayer, session: CountingSession
) -> None:
    await layer.get("key")
    await asyncio.gather(layer.aclose(), layer.get("key"))
    assert (session.made, session.open) == (2, 1)
    await layer.get("key")
    await layer.aclose()
    assert (session.made, session.open) == (2, 0)


async def test_closing_a_layer_that_made_no_client_is_nothing(
    layer: DynamoDBPersistenceLayer, session: CountingSession
) -> None:
    await layer.aclose()
    session.gate = asyncio.Event()
    user = asyncio.ensure_future(layer.get("key"))
    await asyncio.sleep(0)
    user.cancel()
    await asyncio.wait([user])
    await layer.aclose()
    assert session.made == 0


FORKING = """
import asyncio, os, sys
from aidem.persistence.dynamodb import DynamoDBPersistenceLayer
from aidem.testing import claim_of

async def claim(key):
    return (await layer.acquire(claim_of(key, now=1.0, owner=str(os.getpid())), now=1.0)).record.owner

layer = DynamoDBPersistenceLayer(sys.argv[1])
this = os.getpid()
loop = asyncio.new_event_loop()
assert loop.run_until_complete(claim("before")) == str(this)
child = os.fork()  # between two runs of the loop: a child that goes on with it would read from its sockets
if not child:
    assert asyncio.run(claim("before")) == str(this)
    assert asyncio.run(claim("child")) == str(os.getpid())
    os._exit(0)
assert loop.run_until_complete(claim("after")) == str(this)
assert os.waitpid(child, 0)[1] == 0
loop.run_until_complete(layer.aclose())
loop.close()
assert asyncio.run(claim("child")) != str(this)
print("done")
"""


def test_a_forked_child_makes_a_client_of_its_own_and_leaves_the_parents_alone(table: str, database: Database) -> None:
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", FORKING, table],
        cwd=ROOT,
        env=os.environ | database.environment,
        capture_output=True,
        text=True,
        timeout=50,
    )
    assert (run.stdout, run.stderr) == ("done\n", "")


# Threads do not survive a fork, so a loop that does has lost those that AWS's own client hands work to.
FORKING_BETWEEN_RUNS = """
import asyncio, os
from aidem.persistence.dynamodb import DynamoDBPersistenceLayer

class Client:
    async def __aenter__(self):
        return self

    async def __aexit__(self, *error):
        pass

    async def get_item(self, **request):
        return {}

class Session:
    made = 0

    def client(self, service, *, config):
        self.made += 1
        return Client()

session = Session()
layer = DynamoDBPersistenceLayer("table", session=session)
loop = asyncio.new_event_loop()
loop.run_until_complete(layer.get("key"))
child = os.fork()
loop.run_until_complete(layer.get("key")) if not child else os.waitpid(child, 0)
print(session.made, flush=True)
os._exit(0)
"""


def test_a_forked_child_that_goes_on_with_the_loop_has_a_client_of_its_own() -> None:
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", FORKING_BETWEEN_RUNS],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=50,
    )
    assert (run.stdout, run.stderr) == ("2\n1\n", "")


# --- Given ------------------------------------------------------------------------------------------------------------


async def test_a_client_that_was_passed_in_is_used_and_never_closed(table: str) -> None:
    async with get_session().create_client("dynamodb") as client:
        for _ in range(2):
            async with DynamoDBPersistenceLayer(table, client=client) as layer:
                await layer.get("key")
        assert (await client.describe_table(TableName=table))["Table"]["TableName"] == table


@pytest.mark.parametrize("options", [{"session": object()}, {"boto_config": Config()}])
def test_a_client_takes_nothing_beside_it(options: dict[str, Any]) -> None:
    with pytest.raises(IdempotencyPersistenceConfigError, match="used unchanged"):
        DynamoDBPersistenceLayer("table", client=object(), **options)


@pytest.mark.usefixtures("database")
def test_a_client_of_boto3_is_refused() -> None:
    with pytest.raises(IdempotencyPersistenceConfigError, match="a client of boto3, or it is not open; pass"):
        DynamoDBPersistenceLayer("table", client=boto3.client("dynamodb"))


async def test_a_client_that_is_not_open_is_refused(table: str) -> None:
    context: Any = get_session().create_client("dynamodb")
    with pytest.raises(IdempotencyPersistenceConfigError, match="a client of boto3, or it is not open; pass"):
        DynamoDBPersistenceLayer(table, client=context)
    async with context as client:
        assert await DynamoDBPersistenceLayer(table, client=client).get("key") is None


@pytest.mark.parametrize("session", [boto3.Session, get_session])
async def test_a_session_that_makes_no_asynchronous_client_is_refused(session: Any, table: str) -> None:
    with pytest.raises(IdempotencyPersistenceConfigError, match=r"pass an aioboto3\.Session"):
        await DynamoDBPersistenceLayer(table, session=session()).get("key")


# --- Set up -----------------------------------------------------------------------------------------------------------


async def test_a_client_of_our_own_makes_cheap_requests_and_keeps_its_retries(
    layer: DynamoDBPersistenceLayer, session: CountingSession
) -> None:
    await layer.get("key")
    config = session.config
    assert config.parameter_validation is False
    assert config.max_pool_connections == 256
    assert config.user_agent.startswith(f"aidem/{__version__} aiobotocore/")
    assert config.retries is None  # as the environment says, AWS_RETRY_MODE and AWS_MAX_ATTEMPTS
    await layer.aclose()


@pytest.mark.parametrize("kind", [Config, AioConfig])
async def test_what_the_user_sets_wins(kind: Any, table: str, session: CountingSession) -> None:
    given = kind(read_timeout=7, max_pool_connections=3, user_agent_extra="shop")
    if kind is AioConfig:
        given = AioConfig(
            connector_args={"keepalive_timeout": 3}, read_timeout=7, max_pool_connections=3, user_agent_extra="shop"
        )
    layer = DynamoDBPersistenceLayer(table, session=session, boto_config=given)
    await layer.get("key")
    config = session.config
    assert (config.read_timeout, config.max_pool_connections, config.user_agent_extra) == (7, 3, "shop")
    assert config.parameter_validation is False
    if kind is AioConfig:
        assert config.connector_args["keepalive_timeout"] == 3
    await layer.aclose()


async def test_the_user_agent_names_aidem(table: str, database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    async with Proxy.to(database.port) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL_DYNAMODB", f"http://127.0.0.1:{proxy.port}")
        layer = DynamoDBPersistenceLayer(table, boto_config=Config(user_agent_extra="shop/1"))
        await layer.get("key")
        await layer.aclose()
        head = b"".join(proxy.requests).partition(b"\r\n\r\n")[0].decode()
    (agent,) = [line for line in head.splitlines() if line.lower().startswith("user-agent:")]
    assert agent.split(": ")[1].startswith("aidem/0.")
    assert " shop/1" in agent  # Powertools, once imported, adds itself to every client of AWS


async def test_256_tasks_get_their_answers(table: str) -> None:
    async with DynamoDBPersistenceLayer(table) as layer:
        keys = [f"key-{number % 128}" for number in range(256)]
        answers = await asyncio.gather(
            *(layer.acquire(claim_of(key, now=1, owner=str(n)), now=1) for n, key in enumerate(keys))
        )
    kinds = [type(answer) for answer in answers]
    assert (kinds.count(Claimed), kinds.count(Blocked)) == (128, 128)


# --- Installed --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("missing", ["botocore", "aiobotocore"])
def test_a_missing_client_is_answered_with_the_extra_that_brings_it(missing: str) -> None:
    code = f"import sys; sys.modules[{missing!r}] = None; import aidem.persistence.dynamodb"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=50)
    sentence = "the DynamoDB layer needs aioboto3 or aiobotocore: install aidem-idempotency[dynamodb],"
    assert f"ImportError: {sentence}" in run.stderr
