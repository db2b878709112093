"""The same calls through AWS Powertools and through aidem: same results, records and errors, but for what is meant."""

from __future__ import annotations

import collections
import contextlib
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from aws_lambda_powertools.utilities import idempotency as powertools
from aws_lambda_powertools.utilities.idempotency.persistence.cache import CachePersistenceLayer as TheirRedis

from aidem import sync
from aidem.persistence.redis import RedisPersistenceLayer
from tests.differential.differences import INTENDED, as_page
from tests.differential.scenario import Feature, Scenario
from tests.differential.scenarios import SCENARIOS
from tests.differential.seen import LEFT_LEASE, Difference, differences
from tests.differential.sides import AIDEM, POWERTOOLS
from tests.differential.stage import Stage
from tests.differential.stores import DynamoDB, Own, Redis, RedisCluster, Store
from tests.support.redis_clusters import cluster
from tests.support.servers import RedisServer, started

pytestmark = pytest.mark.filterwarnings("ignore:Redis.* will be removed in v4:DeprecationWarning")

PAGE = Path(__file__).parents[2] / "docs" / "migration.md"
LEFT_LEASES = "completed-lease"
"""The one difference that nearly every scenario shows: it is looked at in those that list it."""

TLS_HANDSHAKE = b"\x16"

EACH = [
    pytest.param(scenario, store, id=f"{store}: {scenario.title}", marks=[] if store == "own" else pytest.mark.server)
    for scenario in SCENARIOS
    for store in scenario.stores
]


@pytest.fixture(scope="module")
def redis_server() -> Iterator[RedisServer]:
    with started("redis") as server:
        yield server


@pytest.fixture(scope="module")
def redis_cluster() -> Iterator[RedisServer]:
    with cluster("redis") as nodes:
        yield nodes[0]


@pytest.fixture(scope="module", autouse=True)
def background_loop() -> Iterator[None]:
    yield
    sync.close()


def two_stores(kind: str, request: pytest.FixtureRequest) -> tuple[Store, Store]:
    match kind:
        case "dynamodb":
            database = request.getfixturevalue("database")
            return DynamoDB(database), DynamoDB(database)
        case "redis":
            server = request.getfixturevalue("redis_server")
            return Redis(server, 0), Redis(server, 1)
        case "cluster":
            node = request.getfixturevalue("redis_cluster")
            return RedisCluster(node, 0), RedisCluster(node, 0)
        case _:
            return Own(), Own()


@pytest.mark.parametrize(("scenario", "kind"), EACH)
def test_both_do_the_same_but_for_what_is_meant(
    scenario: Scenario, kind: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    their_store, our_store = two_stores(kind, request)
    for name, value in scenario.environment.items():
        monkeypatch.setenv(name, value)
    found = differences(Stage(POWERTOOLS, scenario, their_store).play(), Stage(AIDEM, scenario, our_store).play())
    if not any(differs.by == LEFT_LEASES for differs in scenario.differs):
        found = {difference for difference in found if difference.aspect != LEFT_LEASE}
    assert found == meant(scenario, kind)


def meant(scenario: Scenario, kind: str) -> set[Difference]:
    return {
        Difference(step, differs.aspect, differs.powertools, differs.aidem)
        for differs in scenario.differs
        if kind in differs.stores
        for step in differs.steps
    }


@pytest.mark.filterwarnings("ignore:Couldn't determine the remaining time:UserWarning")
@pytest.mark.parametrize(("library", "layer"), [(powertools, TheirRedis), (sync, RedisPersistenceLayer)])
def test_both_speak_tls_to_redis_unless_it_is_turned_off(library: Any, layer: Any) -> None:
    with first_bytes() as (port, greetings):
        store = layer(host="127.0.0.1", port=port)
        pay = library.idempotent_function(
            lambda order: None, data_keyword_argument="order", persistence_store=store, key_prefix="pay"
        )
        with pytest.raises(Exception, match=r".") as refused:
            pay(order=1)
    assert "IdempotencyPersistenceLayerError" in {cls.__name__ for cls in type(refused.value).__mro__}
    assert set(greetings) == {TLS_HANDSHAKE}


@contextlib.contextmanager
def first_bytes() -> Iterator[tuple[int, list[bytes]]]:
    """Listen on a port, and hang up after the first byte of every connection."""
    greetings = list[bytes]()

    def listen() -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listener.accept()
                with connection:
                    greetings.append(connection.recv(1))

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=listen)
        thread.start()
        yield listener.getsockname()[1], greetings
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()


# --- The lists --------------------------------------------------------------------------------------------------------


def test_every_intended_difference_is_shown_by_a_scenario() -> None:
    shown = {differs.by for scenario in SCENARIOS for differs in scenario.differs}
    assert shown == {intended.id for intended in INTENDED}


def test_every_feature_has_a_scenario() -> None:
    assert {scenario.feature for scenario in SCENARIOS} == set(Feature)


def test_no_two_scenarios_or_differences_have_one_name() -> None:
    names = [scenario.title for scenario in SCENARIOS] + [intended.id for intended in INTENDED]
    assert [name for name, count in collections.Counter(names).items() if count > 1] == []


def test_the_migration_page_shows_the_list() -> None:
    assert as_page() in PAGE.read_text(encoding="utf-8")
