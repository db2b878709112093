"""Records in a cluster: on three real nodes, whose slots move while they are used."""

from __future__ import annotations

import asyncio
import gc
import logging
import subprocess
import sys
from collections.abc import AsyncGenerator, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
from redis.asyncio import Redis, RedisCluster
from redis.crc import key_slot

from aidem import IdempotencyConfig, idempotent_function
from aidem._rules.lifecycle import Blocked
from aidem.exceptions import IdempotencyPersistenceConfigError, IdempotencyPersistenceConnectionError
from aidem.persistence import PersistenceLayer, open_persistence_layer
from aidem.persistence.redis import RedisPersistenceLayer
from aidem.testing import FakeClock, ScanConformance, TakeOverConformance
from tests.support.processes.harness import Fleet, Orders
from tests.support.processes.log import (
    check_late_owners_changed_nothing,
    check_no_body_starts_under_a_live_lease,
    check_nothing_was_stuck,
    check_one_outcome_per_key,
)
from tests.support.proxy import Proxy
from tests.support.redis import FORKING, acquired, claimed, completed, no_complaints, until
from tests.support.redis_clusters import cluster, errors_of, slot_moving, told
from tests.support.servers import RedisServer, started

pytestmark = [pytest.mark.server, pytest.mark.timeout(120)]
ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module", params=["redis", "valkey"])
def nodes(request: pytest.FixtureRequest) -> Iterator[list[RedisServer]]:
    with cluster(request.param) as nodes:
        yield nodes


@pytest.fixture(autouse=True)
def _nothing_is_stored(request: pytest.FixtureRequest) -> None:
    if "nodes" in request.fixturenames:
        for node in request.getfixturevalue("nodes"):
            told(node, "FLUSHALL")


@pytest.fixture
async def layer(nodes: list[RedisServer]) -> AsyncGenerator[RedisPersistenceLayer]:
    async with RedisPersistenceLayer(url_of(nodes)) as layer:
        yield layer


def url_of(nodes: list[RedisServer], *, name: str = "") -> str:
    return f"redis+cluster://127.0.0.1:{nodes[-1].port}" + (f"?client_name={name}" if name else "")


def key_on(node: int, *, nodes: int = 3, prefix: str = "key") -> str:
    """Return a key whose slot a node has, when all is as it was in the beginning."""
    return next(
        key
        for key in (f"{prefix} {number}" for number in range(10_000))
        if 16384 * node // nodes <= key_slot(key.encode()) < 16384 * (node + 1) // nodes
    )


def connections_of(nodes: list[RedisServer], name: str) -> list[int]:
    return [told(node, "CLIENT", "LIST").count(f" name={name} ") for node in nodes]


async def until_connections(nodes: list[RedisServer], name: str, counts: list[int]) -> None:
    async def has_happened() -> bool:
        return connections_of(nodes, name) == counts

    await until(has_happened)


class TestConformance(TakeOverConformance, ScanConformance):
    pytestmark: ClassVar = [*TakeOverConformance.pytestmark, pytest.mark.server]
    nodes: list[RedisServer]

    @pytest.fixture(autouse=True)
    def _in_this_cluster(self, nodes: list[RedisServer]) -> None:
        self.nodes = nodes

    async def make_layer(self, clock: FakeClock) -> PersistenceLayer:
        return RedisPersistenceLayer(f"redis://127.0.0.1:{self.nodes[0].port}", mode="cluster", clock=clock)


# --- Where commands go ----------------------------------------------------------------------------------------------


async def test_each_node_has_one_connection_that_all_calls_share(nodes: list[RedisServer]) -> None:
    async with RedisPersistenceLayer(url_of(nodes, name="sharing")) as layer:

        async def call(number: int) -> None:
            record = await claimed(layer, f"{number}", f"owner {number}")
            assert record.owner == f"owner {number}"
            assert await completed(layer, record, f'"{number}"')

        await asyncio.gather(*(call(number) for number in range(300)))
        found = await layer.get("7")
        assert found is not None
        assert found.response_data == '"7"'
        await layer.forget("7")
        assert await layer.get("7") is None
        assert connections_of(nodes, "sharing") == [1, 1, 1]


async def test_a_call_takes_one_round_trip_for_each_step_to_where_the_client_says_that_nodes_are(
    nodes: list[RedisServer], layer: RedisPersistenceLayer
) -> None:
    async with Proxy.to(nodes[1].port) as proxy:

        def remap(address: tuple[str, int]) -> tuple[str, int]:
            host, port = address
            return (host, proxy.port) if port == nodes[1].port else address

        client = RedisCluster(host="127.0.0.1", port=nodes[0].port, address_remap=remap)
        async with RedisPersistenceLayer(client=client) as behind:
            await completed(behind, await claimed(behind, key_on(1, prefix="warm")))  # it knows the scripts
            proxy.requests.clear()
            key = key_on(1)
            record = await claimed(behind, key)
            assert await completed(behind, record)
            assert isinstance(await acquired(behind, key, "another"), Blocked)
            assert [request.count(b"EVALSHA") for request in proxy.requests] == [1, 1, 1]
        await client.aclose()


async def test_a_slot_that_moves_takes_its_records_along_and_calls_follow(
    nodes: list[RedisServer], layer: RedisPersistenceLayer
) -> None:
    source, target = nodes[0], nodes[1]
    stays = key_on(0)
    slot = key_slot(stays.encode())
    record = await claimed(layer, stays)
    before = errors_of(nodes, "ASK"), errors_of(nodes, "MOVED")
    with slot_moving(slot, source, target, nodes=nodes):
        assert await layer.renew(record, now=0) is not None  # it is still where it was
        assert errors_of(nodes, "ASK") == before[0]
        others = [f"{{{stays}}} {number}" for number in range(40)]
        new = await asyncio.gather(*(claimed(layer, key, key) for key in others))
        assert [claim.owner for claim in new] == others  # nobody got another's reply
        assert errors_of(nodes, "ASK") == before[0] + 40
        assert told(target, "CLUSTER", "COUNTKEYSINSLOT", slot) == 40
        assert await completed(layer, new[0])
        assert errors_of(nodes, "MOVED") == before[1]
    assert await completed(layer, record)
    assert errors_of(nodes, "MOVED") == before[1] + 1
    assert isinstance(await acquired(layer, stays, "another"), Blocked)
    assert errors_of(nodes, "MOVED") == before[1] + 1  # it is known by now
    with slot_moving(slot, target, source, nodes=nodes):
        pass
    assert await layer.release(new[1])


async def test_a_script_that_a_node_does_not_know_is_sent_there_in_full_with_leave_to_enter(
    nodes: list[RedisServer], layer: RedisPersistenceLayer
) -> None:
    key = key_on(2)
    slot = key_slot(key.encode())
    before = errors_of(nodes, "ASK")
    with slot_moving(slot, nodes[2], nodes[0], nodes=nodes):
        told(nodes[0], "SCRIPT", "FLUSH")
        assert (await claimed(layer, key)).owner == "ours"
        assert errors_of(nodes, "ASK") == before + 1
    with slot_moving(slot, nodes[0], nodes[2], nodes=nodes):
        pass


async def test_a_user_with_few_rights_follows_slots_that_move(nodes: list[RedisServer]) -> None:
    rights = "~aidem* &aidem:* +evalsha +eval +get +set +del +pttl +publish +subscribe +unsubscribe +time"
    for node in nodes:
        told(node, "ACL", "SETUSER", "payments", "on", ">secret-word", *rights.split(), "+cluster|slots", "+asking")
    key = key_on(1, prefix="aidem")
    slot = key_slot(key.encode())
    before = errors_of(nodes, "ASK"), errors_of(nodes, "MOVED")
    url = f"redis+cluster://payments:secret-word@127.0.0.1:{nodes[2].port}"
    async with RedisPersistenceLayer(url) as layer, RedisPersistenceLayer(url) as other:
        with slot_moving(slot, nodes[1], nodes[0], nodes=nodes):
            record = await claimed(layer, key)
            assert errors_of(nodes, "ASK") == before[0] + 1
        waiting = asyncio.ensure_future(other.wait_for_change(key, 50))
        await other.wait_for_change("aidem", 1)
        assert await completed(layer, record)
        await asyncio.wait_for(waiting, 20)
        assert errors_of(nodes, "MOVED") == before[1] + 1
    with slot_moving(slot, nodes[0], nodes[1], nodes=nodes):
        pass


# --- Being told of changes ------------------------------------------------------------------------------------------


async def test_a_waiter_is_woken_wherever_the_key_is(nodes: list[RedisServer], layer: RedisPersistenceLayer) -> None:
    async with RedisPersistenceLayer(url_of(nodes, name="waiting")) as waiting:
        for node in range(3):
            key = key_on(node)
            record = await claimed(layer, key)
            task = asyncio.ensure_future(waiting.wait_for_change(key, 50))

            async def is_subscribed(key: str = key) -> bool:
                return any(f"aidem:changed:{key}" in told(each, "PUBSUB", "CHANNELS") for each in nodes)

            await until(is_subscribed)
            assert not task.done()
            assert await completed(layer, record)
            await asyncio.wait_for(task, 20)
        assert sum(connections_of(nodes, "waiting")) == 4  # one line to each node, one listener in all


# --- Loops, processes, ends -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", ["idle", "looking", "asking", "listening"])
def test_a_loop_that_ends_closes_its_connections_to_all_nodes_without_complaint(
    nodes: list[RedisServer], state: str
) -> None:
    layer = RedisPersistenceLayer(url_of(nodes, name=state))
    keys = [key_on(node) for node in range(3)]

    async def use() -> None:
        if state != "looking":
            await asyncio.gather(*(layer.get(key) for key in keys))
        if state != "idle":
            operations = [layer.get(key) for key in keys]
            assert not operations[0].done()
        if state == "listening":
            await layer.wait_for_change("key", 0.05)

    for _ in range(2):
        asyncio.run(use())
        gc.collect()
        asyncio.run(until_connections(nodes, state, [0, 0, 0]))


async def test_closing_waits_for_what_was_asked_and_later_use_opens_anew(nodes: list[RedisServer]) -> None:
    layer = RedisPersistenceLayer(url_of(nodes))
    keys = [key_on(node, prefix="never stored") for node in range(3)]
    for is_known in (False, True):
        if is_known:
            await asyncio.gather(*(layer.get(key) for key in keys))
        operations = [layer.get(key) for key in keys]
        await layer.aclose()
        assert [operation.result() for operation in operations] == [None] * 3


async def test_a_layer_that_is_dropped_closes_its_connections(nodes: list[RedisServer]) -> None:
    layer = RedisPersistenceLayer(url_of(nodes, name="dropped"))
    with no_complaints():
        await layer.open()
        assert connections_of(nodes, "dropped") == [1, 1, 1]
        del layer
        gc.collect()
        await until_connections(nodes, "dropped", [0, 0, 0])


def test_a_forked_child_uses_connections_of_its_own(nodes: list[RedisServer]) -> None:
    worker = subprocess.run(
        [sys.executable, "-W", "error", "-W", "ignore::DeprecationWarning", "-c", FORKING, url_of(nodes)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=50,
    )
    assert worker.stdout.split() == ["Claimed", "0", "Blocked"] * 3, worker.stderr
    assert worker.stderr == ""


# --- Options --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"decode_responses": True, "protocol": 3}, {"read_from_replicas": True}])
@pytest.mark.filterwarnings("ignore:.*read_from_replicas:DeprecationWarning")
@pytest.mark.parametrize("is_used", [False, True])
async def test_a_client_of_the_user_is_taken_as_a_pattern_and_left_alone(
    nodes: list[RedisServer], options: dict[str, Any], is_used: bool
) -> None:
    client = RedisCluster(host="127.0.0.1", port=nodes[0].port, client_name="pattern", **options)
    if is_used:
        await client.set("of the user", "1")
    before = (
        client.nodes_manager.default_node,
        dict(client.nodes_manager.nodes_cache),
        connections_of(nodes, "pattern"),
    )
    async with RedisPersistenceLayer(client=client, mode="cluster") as layer:
        key = key_on(2)
        await completed(layer, await claimed(layer, key))
        await layer.forget(key)
    await until_connections(nodes, "pattern", before[2])
    assert (client.nodes_manager.default_node, client.nodes_manager.nodes_cache) == before[:2]
    assert await client.set("of the user", "2")
    await client.aclose()


@pytest.mark.parametrize("form", ["mode", "two nodes", "host", "by the environment"])
async def test_a_cluster_may_be_named_in_several_ways(nodes: list[RedisServer], form: str) -> None:
    port, key = nodes[0].port, key_on(1)
    layer: Any = {
        "mode": lambda: RedisPersistenceLayer(f"redis://127.0.0.1:{port}", mode="cluster"),
        "two nodes": lambda: RedisPersistenceLayer(f"redis+cluster://127.0.0.1:1,127.0.0.1:{port}"),
        "host": lambda: RedisPersistenceLayer(host="127.0.0.1", port=port, ssl=False, mode="cluster"),
        "by the environment": lambda: open_persistence_layer(f"redis+cluster://127.0.0.1:{port}"),
    }[form]()
    async with layer:
        assert (await claimed(layer, key, form)).owner == form
        await layer.forget(key)


async def test_opening_looks_at_every_node_and_says_each_thing_once(
    nodes: list[RedisServer], caplog: pytest.LogCaptureFixture
) -> None:
    told(nodes[1], "CONFIG", "SET", "maxmemory", "1gb", "maxmemory-policy", "allkeys-lru")
    async with RedisPersistenceLayer(url_of(nodes)):
        pass
    told(nodes[1], "CONFIG", "SET", "maxmemory", "0", "maxmemory-policy", "noeviction")
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 2
    assert "appendonly is no" in warnings[0]
    assert "maxmemory-policy is allkeys-lru" in warnings[1]


async def test_a_server_that_is_no_cluster_is_refused() -> None:
    with started("valkey") as server:
        layer = RedisPersistenceLayer(server.url, mode="cluster")
        with pytest.raises(IdempotencyPersistenceConfigError, match="is not a node of a cluster; leave out mode="):
            await layer.get("key")
        await layer.aclose()


async def test_the_lock_of_powertools_is_not_looked_for_in_a_cluster(
    nodes: list[RedisServer], layer: RedisPersistenceLayer
) -> None:
    key = key_on(0)
    told(nodes[0], "SET", key, '{"status": "INPROGRESS", "in_progress_expiration": 1}')
    assert (await claimed(layer, key)).owner == "ours"
    with pytest.raises(IdempotencyPersistenceConfigError, match="lock of Powertools is in another slot"):
        RedisPersistenceLayer(url_of(nodes), shared_with_powertools=True)


# --- When slots and nodes are gone ----------------------------------------------------------------------------------


async def test_a_slot_that_nobody_serves_is_waited_for_and_then_said_to_be_missing() -> None:
    key = "key"
    slot = key_slot(key.encode())
    with cluster("valkey", primaries=1) as (node,):
        layer = RedisPersistenceLayer(url_of([node]), timeout_seconds=1.0)
        record = await claimed(layer, key)
        told(node, "CLUSTER", "DELSLOTS", slot)
        with pytest.raises(IdempotencyPersistenceConnectionError, match=r"CLUSTERDOWN|serves the slot"):
            await completed(layer, record)
        assert errors_of([node], "CLUSTERDOWN")
        await layer.aclose()
        patient = RedisPersistenceLayer(url_of([node]), timeout_seconds=20)
        waiting = asyncio.ensure_future(completed(patient, record))
        await asyncio.sleep(0.3)
        assert not waiting.done()
        told(node, "CLUSTER", "ADDSLOTS", slot)
        assert await asyncio.wait_for(waiting, 20)
        await patient.aclose()


# --- Processes ------------------------------------------------------------------------------------------------------


def test_processes_that_are_killed_and_stopped_while_slots_move_leave_one_outcome_for_each_key(
    nodes: list[RedisServer], tmp_path: Path
) -> None:
    orders = Orders(
        argument=url_of(nodes),
        log=str(tmp_path / "log"),
        keys=[f"{nodes[0].port}-{number}" for number in range(40)],
        lease_seconds=1.0,
        wait_timeout_seconds=30.0,
        body_seconds=(0.01, 0.05),
        tasks=1,  # who is stopped in a body is then not about to begin another one
        shuffled=True,
    )
    before = errors_of(nodes, "MOVED") + errors_of(nodes, "ASK")
    with Fleet(orders, 4, kills=1, stops=1) as fleet:
        fleet.go()
        fleet.wait_for_ends()
        killed, stopped = fleet.killed, fleet.stopped
        moves = slots_in_use(nodes)[:6]
        for slot, source, target in moves:
            with slot_moving(slot, source, target, nodes=nodes):
                pass
        fleet.wait_until(lambda log: stopped <= {body.pid for body in log.taken_over()})
        fleet.resume()
        fleet.join(60)
        log = fleet.log()
    for slot, source, target in moves:
        with slot_moving(slot, target, source, nodes=nodes):
            pass
    assert errors_of(nodes, "MOVED") + errors_of(nodes, "ASK") > before
    assert {body.pid for body in log.taken_over()} >= stopped | killed
    assert set(log.results()) == set(orders.keys)
    check_one_outcome_per_key(log)
    check_no_body_starts_under_a_live_lease(log)
    check_late_owners_changed_nothing(log)
    check_nothing_was_stuck(log, seconds_per_lease=orders.lease_seconds, slack_seconds=20, stopped=stopped)


def slots_in_use(nodes: list[RedisServer]) -> list[tuple[int, RedisServer, RedisServer]]:
    """Return the slots that have records, those with claims first, where each is, and another node for it.

    One of the claims is that of a worker that is stopped, which does not know of a move when it goes on.
    """
    found = dict[int, tuple[bool, int]]()
    for number, node in enumerate(nodes):
        for key in told(node, "KEYS", "fleet*"):
            is_claim = "INPROGRESS" in (told(node, "GET", key) or "")
            slot = key_slot(key.encode())
            found[slot] = (is_claim or found.get(slot, (False, 0))[0], number)
    slots = sorted(found, key=lambda slot: (not found[slot][0], slot))
    return [(slot, nodes[found[slot][1]], nodes[(found[slot][1] + 1) % len(nodes)]) for slot in slots]


async def test_calls_of_two_functions_in_a_cluster_run_once_each(layer: RedisPersistenceLayer) -> None:
    calls = list[int]()

    @idempotent_function(
        data_keyword_argument="order", persistence_store=layer, config=IdempotencyConfig(wait_timeout_seconds=20)
    )
    async def pay(order: int) -> int:
        calls.append(order)
        return order

    answers = await asyncio.gather(*(pay(order=number % 20) for number in range(100)))
    assert answers == [number % 20 for number in range(100)]
    assert sorted(calls) == list(range(20))


async def test_a_stand_alone_layer_says_what_to_do_when_it_meets_a_cluster(nodes: list[RedisServer]) -> None:
    async with Redis(port=nodes[0].port) as client:
        layer = RedisPersistenceLayer(client=client, shared_with_powertools=False)
        with pytest.raises(IdempotencyPersistenceConnectionError, match="use mode='cluster'"):
            await layer.get(key_on(1))
        await layer.aclose()
