"""What the migration page says: the same file before and after the move, on the same records."""

from __future__ import annotations

import contextvars
import difflib
import importlib
import inspect
import itertools
import re
import socket
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from aws_lambda_powertools.utilities import idempotency as powertools
from aws_lambda_powertools.utilities.idempotency import exceptions as their_exceptions
from aws_lambda_powertools.utilities.idempotency.persistence import datarecord as their_record
from aws_lambda_powertools.utilities.idempotency.persistence.cache import CachePersistenceLayer
from aws_lambda_powertools.utilities.idempotency.serialization.pydantic import PydanticSerializer as TheirSerializer
from aws_lambda_powertools.warnings import PowertoolsUserWarning
from redis.exceptions import RedisClusterException

from aidem import DataRecord, exceptions, sync
from aidem.config import IdempotencyConfig
from aidem.persistence import PersistenceLayer
from aidem.persistence.redis import RedisPersistenceLayer
from aidem.serialization import PydanticSerializer
from aidem.testing import FakeClock, PersistenceLayerConformance
from tests.migration import own_layer_after, own_layer_before
from tests.support.aws_servers import Database
from tests.support.servers import RedisServer, started

pytestmark = [
    pytest.mark.filterwarnings("ignore:Redis.* will be removed in v4:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Couldn't determine the remaining time:UserWarning"),
]

HERE = Path(__file__).parent
PAGE = (HERE.parents[1] / "docs" / "migration.md").read_text(encoding="utf-8")
EVENT = {"order_id": "o-1", "at": 1}
RETRY = {"order_id": "o-1", "at": 2}
CHARGED = {"statusCode": 200, "body": "charged o-1"}
MD5 = ', hash_function="md5"'


@dataclass
class Invocation:
    """The part of a Lambda context that matters here."""

    def get_remaining_time_in_millis(self) -> int:
        return 30_000


def text_of(name: str) -> str:
    return (HERE / f"{name}.py").read_text(encoding="utf-8")


def deployed(text: str) -> Any:
    """Return a module as Lambda imports it: whatever is in it, its name is the same, and so are its keys."""
    module = sys.modules["app"] = ModuleType("app")
    exec(compile(text, "app.py", "exec", dont_inherit=True), module.__dict__)
    del sys.modules["app"]
    return module


def invoked(app: Any, event: dict[str, Any]) -> Any:
    # A registered context would outlast the test.
    return contextvars.copy_context().run(app.handler, event, Invocation())


@pytest.fixture(scope="module", autouse=True)
def background_loop() -> Iterator[None]:
    yield
    sync.close()


# --- Handlers on DynamoDB ---------------------------------------------------------------------------------------------


@pytest.fixture
def idempotency_table(table: str, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("IDEMPOTENCY_TABLE", table)
    monkeypatch.setenv("AWS_LAMBDA_FUNCTION_NAME", "payments")
    return table


@pytest.mark.server
@pytest.mark.parametrize(
    ("first", "second"), [*itertools.permutations(["handler_before", "handler_after", "handler_async"], 2)]
)
def test_each_handler_replays_what_the_other_has_stored(first: str, second: str, idempotency_table: str) -> None:
    old, new = deployed(text_of(first)), deployed(text_of(second))
    assert invoked(old, EVENT) == invoked(new, RETRY) == CHARGED
    assert (old.charges, new.charges) == (["o-1"], [])


@pytest.mark.server
def test_records_have_the_name_of_the_lambda_function_and_of_the_handler_in_their_keys(
    idempotency_table: str, database: Database
) -> None:
    for name in ("handler_before", "handler_after", "handler_async"):
        invoked(deployed(text_of(name)), EVENT)
    (item,) = database.items(idempotency_table)
    assert re.fullmatch(r"payments\.app\.handler#[0-9a-f]{32}", item["id"]["S"])


@pytest.mark.server
def test_without_md5_nothing_that_is_there_is_found(idempotency_table: str) -> None:
    old, forgetful = deployed(text_of("handler_before")), deployed(text_of("handler_after").replace(MD5, ""))
    invoked(old, EVENT)
    assert invoked(forgetful, RETRY) == CHARGED
    assert (old.charges, forgetful.charges) == (["o-1"], ["o-1"])


# --- Functions on Redis -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def redis_server() -> Iterator[RedisServer]:
    with started("redis") as server:
        yield server


@pytest.mark.server
@pytest.mark.parametrize(("first", "second"), [*itertools.permutations(["function_before", "function_after"], 2)])
def test_each_function_replays_what_the_other_has_stored(
    first: str, second: str, redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REDIS_URL", redis_server.url)
    old, new = deployed(text_of(first)), deployed(text_of(second))
    order = f"{first}-first"
    assert invoked(old, {"orders": [{"id": order}]}) == invoked(new, {"orders": [{"id": order, "at": 2}]}) == [order]
    assert (old.charges, new.charges) == ([order], [])


# --- Layers of one's own ----------------------------------------------------------------------------------------------


class TestOwnLayer(PersistenceLayerConformance):
    adds_clock_skew = True

    async def make_layer(self, clock: FakeClock) -> PersistenceLayer:
        return own_layer_after.OwnPersistenceLayer({}, clock=clock)


@pytest.mark.parametrize("they_are_first", [True, False])
def test_each_layer_replays_what_the_other_has_stored(they_are_first: bool) -> None:
    items: dict[str, dict[str, Any]] = {}
    charges = list[str]()

    def charge(order: str) -> str:
        charges.append(order)
        return f"charged {order}"

    theirs = powertools.idempotent_function(
        charge, data_keyword_argument="order", persistence_store=own_layer_before.OwnPersistenceLayer(items)
    )
    ours = sync.idempotent_function(
        data_keyword_argument="order",
        persistence_store=own_layer_after.OwnPersistenceLayer(items),
        config=IdempotencyConfig(hash_function="md5"),
    )(charge)
    for function in (theirs, ours) if they_are_first else (ours, theirs):
        assert function(order="o-1") == "charged o-1"
    assert charges == ["o-1"]


# --- What tests and code may notice -----------------------------------------------------------------------------------


def test_warnings_are_user_warnings_of_a_class_of_our_own() -> None:
    assert issubclass(exceptions.IdempotencyWarning, UserWarning)
    assert issubclass(PowertoolsUserWarning, UserWarning)
    assert not issubclass(exceptions.IdempotencyWarning, PowertoolsUserWarning)


def test_a_record_needs_a_status_and_takes_any() -> None:
    theirs = their_record.DataRecord("k", "PAUSED")
    with pytest.raises(their_exceptions.IdempotencyInvalidStatusError):
        _ = theirs.status
    ours: Any = DataRecord
    with pytest.raises(TypeError, match="status"):
        ours(idempotency_key="k")
    assert ours(idempotency_key="k", status="PAUSED").status == "PAUSED"


async def test_an_unreachable_redis_cluster_is_found_at_first_use() -> None:
    nowhere: dict[str, Any] = {"host": "127.0.0.1", "port": unused_port(), "mode": "cluster", "ssl": False}
    with pytest.raises(RedisClusterException):
        CachePersistenceLayer(**nowhere)
    layer = RedisPersistenceLayer(**nowhere)
    with pytest.raises(exceptions.IdempotencyPersistenceConnectionError):
        await layer.open()


def unused_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def test_a_claim_that_fails_is_released_by_us_alone() -> None:
    asked = list[str]()

    class TheirStore(own_layer_before.OwnPersistenceLayer):
        def _put_record(self, data_record: Any) -> None:
            super()._put_record(data_record)
            asked.append("claim")
            raise ConnectionError

        def _delete_record(self, data_record: Any) -> None:
            asked.append("release")

    class OurStore(own_layer_after.OwnPersistenceLayer):
        async def acquire(self, *args: Any, **options: Any) -> Any:
            await super().acquire(*args, **options)
            asked.append("claim")
            raise ConnectionError

        async def release(self, record: DataRecord) -> bool:
            asked.append("release")
            return await super().release(record)

    for library, store in ((powertools, TheirStore({})), (sync, OurStore({}))):
        decorated: Any = library
        pay = decorated.idempotent_function(
            lambda order: None, data_keyword_argument="order", persistence_store=store, key_prefix="pay"
        )
        with pytest.raises(Exception, match=r".") as failed:
            pay(order=1)
        assert "IdempotencyPersistenceLayerError" in {cls.__name__ for cls in type(failed.value).__mro__}
    assert asked == ["claim", "claim", "release"]


def test_pydantics_serializer_takes_an_annotation_that_is_no_model() -> None:
    def pay(order: int) -> dict[str, int]:
        return {"paid": order}

    options: dict[str, Any] = {"data_keyword_argument": "order", "key_prefix": "pay"}
    with pytest.raises((their_exceptions.IdempotencyModelTypeError, TypeError)):
        powertools.idempotent_function(
            pay,
            persistence_store=own_layer_before.OwnPersistenceLayer({}),
            output_serializer=TheirSerializer,
            **options,
        )
    ours = sync.idempotent_function(
        persistence_store=own_layer_after.OwnPersistenceLayer({}), output_serializer=PydanticSerializer, **options
    )(pay)
    assert ours(order=1) == ours(order=1) == {"paid": 1}


# --- The page ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("handler_before", "handler_after"),
        ("handler_after", "handler_async"),
        ("function_before", "function_after"),
    ],
)
def test_the_page_shows_what_changes_in_a_file(before: str, after: str) -> None:
    lines = difflib.unified_diff(text_of(before).splitlines(), text_of(after).splitlines(), n=100, lineterm="")
    shown = "\n".join(line.rstrip() for line in itertools.islice(lines, 3, None))
    assert f"```diff\n{shown}\n```" in PAGE


def test_every_name_in_the_page_can_be_imported_where_it_is_said_to_be() -> None:
    rows = re.findall(r"^\| `((?:aws_lambda_powertools|\.\.\.)[\w.]*)` \| `(aidem[\w.]*)` \|$", PAGE, re.MULTILINE)
    assert len(rows) > 5
    for theirs, ours in rows:
        full = theirs.replace("...", "aws_lambda_powertools.utilities.idempotency.")
        for path in (full, ours):
            module, _, name = path.rpartition(".")
            assert hasattr(importlib.import_module(module), name), path


def test_the_page_names_every_error_that_is_gone() -> None:
    theirs = {name for name in vars(their_exceptions) if name.startswith("Idempotency")}
    gone = {name for name in theirs if not hasattr(exceptions, name)}
    assert gone
    assert gone == set(re.findall(r"^\| `(Idempotency\w+Error)` \| gone", PAGE, re.MULTILINE))


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        (powertools.IdempotencyConfig, IdempotencyConfig),
        (powertools.idempotent_function, sync.idempotent_function),
        (CachePersistenceLayer.__init__, RedisPersistenceLayer),
    ],
)
def test_every_option_of_theirs_is_one_of_ours(theirs: Any, ours: Any) -> None:
    ours_by_keyword = {name for name, parameter in parameters(ours) if parameter.kind is not parameter.POSITIONAL_ONLY}
    assert {name for name, _ in parameters(theirs)} - ours_by_keyword <= {"self", "function", "kwargs"}


def test_the_page_names_the_options_of_dynamodb_that_are_called_otherwise() -> None:
    from aidem.persistence import dynamodb

    theirs, ours = (
        {name for name, _ in parameters(layer)}
        for layer in (powertools.DynamoDBPersistenceLayer, dynamodb.DynamoDBPersistenceLayer)
    )
    assert theirs - ours == set(re.findall(r"^\| `(boto3_\w+)` \|", PAGE, re.MULTILINE))


def parameters(function: Any) -> list[tuple[str, inspect.Parameter]]:
    return list(inspect.signature(function).parameters.items())
