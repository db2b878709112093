from __future__ import annotations

import json
import re
import time
import traceback
from collections.abc import AsyncGenerator, Iterator
from typing import Any

import pytest
from fakeredis import FakeAsyncRedis

from aidem import IdempotencyConfig, idempotent_function
from aidem._rules.lifecycle import Blocked, Claimed
from aidem._rules.record import OutcomeKind, RecordStatus
from aidem.exceptions import (
    IdempotencyInvalidStatusError,
    IdempotencyPersistenceConfigError,
    IdempotencyPersistenceConnectionError,
    IdempotencyPersistenceLayerError,
    IdempotencySerializationError,
)
from aidem.hooks import EventKind, IdempotencyEvent
from aidem.persistence import PersistenceLayer, SupportsWaitForChange, open_persistence_layer
from aidem.persistence._stored import NOT_A_TEXT
from aidem.persistence.redis import MAX_RECORD_BYTES, RedisCachePersistenceLayer, RedisPersistenceLayer
from aidem.testing import FakeClock, claim_of, completed_of
from tests.support.redis import acquired, claimed, client_of, completed, fake_server, stored, taken_over
from tests.support.servers import RedisServer, started

pytestmark = pytest.mark.server


@pytest.fixture(scope="module", params=["redis", "valkey"])
def server(request: pytest.FixtureRequest) -> Iterator[RedisServer]:
    with started(request.param) as server:
        yield server


@pytest.fixture
async def client(server: RedisServer) -> AsyncGenerator[Any]:
    async with client_of(server) as client:
        await client.flushall()
        yield client


@pytest.fixture
async def layer(server: RedisServer, client: Any) -> AsyncGenerator[RedisPersistenceLayer]:
    layer = RedisPersistenceLayer(server.url)
    yield layer
    await layer.aclose()


def test_a_redis_layer_is_a_persistence_layer_that_tells_of_changes_and_has_the_name_it_has_in_powertools() -> None:
    layer = RedisPersistenceLayer("redis://127.0.0.1")
    assert isinstance(layer, PersistenceLayer)
    assert isinstance(layer, SupportsWaitForChange)
    assert not hasattr(layer, "clock")
    assert RedisCachePersistenceLayer is RedisPersistenceLayer


# --- What is stored -------------------------------------------------------------------------------------------------


async def test_a_claim_is_json_text_as_powertools_writes_it(layer: RedisPersistenceLayer, client: Any) -> None:
    record = await claimed(layer, payload_hash="hash", note="order 7")
    text = await client.get("key")
    assert text == json.dumps(json.loads(text))
    assert json.loads(text) == {
        "expiration": record.expiry_timestamp,
        "in_progress_expiration": record.in_progress_expiry_timestamp,
        "status": "INPROGRESS",
        "validation": "hash",
        "owner": "ours",
        "note": "order 7",
        "fence": record.fence,
    }
    assert re.search(r'"in_progress_expiration": \d{13}, ', text)  # digits, no exponent


async def test_a_claim_that_must_not_be_taken_over_has_the_end_of_its_lease_elsewhere(
    layer: RedisPersistenceLayer, client: Any
) -> None:
    record = await claimed(layer, may_be_taken_over=False)
    fields = await stored(client)
    assert "in_progress_expiration" not in fields
    assert fields["lease_expiration"] == record.lease_expiry_timestamp


async def test_an_outcome_is_json_text_as_powertools_reads_it(layer: RedisPersistenceLayer, client: Any) -> None:
    record = await claimed(layer, payload_hash="hash")
    await completed(layer, record, '["ü", 9007199254740993]')
    text = await client.get("key")
    assert text == json.dumps(json.loads(text))
    assert await stored(client) == {
        "expiration": pytest.approx(time.time() + 60, abs=30),
        "status": "COMPLETED",
        "validation": "hash",
        "owner": "ours",
        "fence": record.fence,
        "data": '["ü", 9007199254740993]',
    }


async def test_an_outcome_without_text_or_of_another_kind_is_stored_so(
    layer: RedisPersistenceLayer, client: Any
) -> None:
    now = time.time()
    record = completed_of(await claimed(layer), now=now, outcome=OutcomeKind.UNAVAILABLE)
    await layer.complete(record.replace(response_data=None), now=now)
    fields = await stored(client)
    assert fields["outcome"] == "unavailable"
    assert "data" not in fields


async def test_the_store_drops_a_record_when_it_has_expired_and_not_earlier(
    layer: RedisPersistenceLayer, client: Any
) -> None:
    record = await claimed(layer)
    assert record.expiry_timestamp is not None
    for action in (lambda: layer.renew(record, now=time.time()), lambda: completed(layer, record)):
        async with client.pipeline() as at_once:
            (seconds, microseconds), text, lifetime = await at_once.time().get("key").pttl("key").execute()
        now = seconds * 1000 + microseconds // 1000
        assert now + lifetime == pytest.approx((json.loads(text)["expiration"] + 1) * 1000, abs=500)
        await action()


async def test_a_record_that_never_expires_has_no_lifetime(layer: RedisPersistenceLayer, client: Any) -> None:
    now = time.time()
    await layer.acquire(claim_of("key", now=now).replace(expiry_timestamp=None), now=now)
    assert "expiration" not in await stored(client)
    assert await client.pttl("key") == -1


async def test_a_record_that_has_expired_at_once_does_not_stay(layer: RedisPersistenceLayer, client: Any) -> None:
    now = time.time()
    await layer.acquire(claim_of("key", now=now, kept_seconds=-100), now=now)
    assert await client.pttl("key") < 1000


async def test_every_name_may_be_another_one(server: RedisServer, client: Any) -> None:
    names = {
        f"{name}_attr": f"{name} \"'<status>]] %s ü\\\n"
        for name in (
            *("expiry", "in_progress_expiry", "status", "data", "validation_key"),
            *("owner", "fence", "lease_expiry", "outcome", "note"),
        )
    }
    layer = RedisPersistenceLayer(server.url, **names)  # type: ignore[arg-type]
    async with layer:
        record = await claimed(layer, payload_hash="hash", note="order 7")
        assert set(await stored(client)) == {
            names[f"{name}_attr"]
            for name in ("expiry", "in_progress_expiry", "status", "validation_key", "owner", "fence", "note")
        }
        assert await acquired(layer) == Claimed(record)
        assert isinstance(await acquired(layer, owner="theirs"), Blocked)
        assert await layer.renew(record, now=time.time()) is not None
        now = time.time()
        assert await layer.take_over(record, claim_of("key", now=now, owner="theirs"), now=now) is None
        record = await taken_over(layer, record, force=True)
        assert await completed(layer, record)
        assert await completed(layer, record)
        found = await layer.get("key")
        assert found is not None
        assert (found.owner, found.fence, found.payload_hash) == ("ours again", record.fence, "hash")


async def test_a_renewal_leaves_what_it_does_not_know_as_it_is(layer: RedisPersistenceLayer, client: Any) -> None:
    record = await claimed(layer)
    text = await client.get("key")
    await client.set("key", text[:-1] + ', "more": [[], 12345678901234567890]}')
    assert await layer.renew(record, now=time.time()) is not None
    assert (await client.get("key")).endswith(', "more": [[], 12345678901234567890]}')


# --- What others have stored ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [str, float, int, lambda value: f"{value}.0"])
async def test_numbers_of_others_may_be_digits_or_floats(
    layer: RedisPersistenceLayer, client: Any, number: Any
) -> None:
    now = int(time.time())
    fields = {"status": "INPROGRESS", "expiration": number(now + 60), "in_progress_expiration": number(now * 1000 - 1)}
    await client.set("key", json.dumps(fields))
    found = await layer.get("key")
    assert found is not None
    assert (found.expiry_timestamp, found.in_progress_expiry_timestamp) == (now + 60, now * 1000 - 1)
    answer = await acquired(layer)
    assert isinstance(answer, Claimed)
    assert answer.taken_over


@pytest.mark.parametrize("value", [None, True, "soon", [], {}, "", float("inf")])
async def test_what_is_no_number_is_no_instant(layer: RedisPersistenceLayer, client: Any, value: Any) -> None:
    await client.set("key", json.dumps({"status": "INPROGRESS", "in_progress_expiration": value}))
    answer = await acquired(layer)
    assert isinstance(answer, Blocked)


async def test_a_claim_of_powertools_without_lease_blocks_until_it_expires(
    layer: RedisPersistenceLayer, client: Any
) -> None:
    now = int(time.time())
    await client.set("key", json.dumps({"status": "INPROGRESS", "expiration": now + 60}))
    assert isinstance(await acquired(layer), Blocked)
    await client.set("key", json.dumps({"status": "INPROGRESS", "expiration": now - 60}))
    assert isinstance(await acquired(layer), Claimed)


async def test_data_that_is_no_text_cannot_be_taken_for_a_result(layer: RedisPersistenceLayer, client: Any) -> None:
    await client.set("key", json.dumps({"status": "COMPLETED", "expiration": int(time.time()) + 60, "data": {"a": 1}}))
    answer = await acquired(layer)
    assert isinstance(answer, Blocked)
    with pytest.raises(ValueError, match="Expecting value"):
        answer.record.response_json_as_dict()


@pytest.mark.parametrize(
    "text", ["", "no json", "[]", "{}", "1", '"INPROGRESS"', '{"status": 1}', "{" * 5000, "[" * 5000, b"\xff{}"]
)
async def test_a_text_that_is_no_record_counts_as_absent(
    layer: RedisPersistenceLayer, client: Any, text: str | bytes
) -> None:
    await client.set("key", text)
    assert await layer.get("key") is None
    assert not await layer.release(claim_of("key", now=0))
    assert await layer.renew(claim_of("key", now=0), now=0) is None
    assert (await claimed(layer)).owner == "ours"
    await client.set("key", text)
    assert await completed(layer, claim_of("key", now=0))
    assert await stored(client)


@pytest.mark.parametrize("fields", [{"status": "PAUSED"}, {"status": "COMPLETED", "outcome": "lost"}])
async def test_a_state_that_is_not_known_is_refused(
    layer: RedisPersistenceLayer, client: Any, fields: dict[str, str]
) -> None:
    await client.set("key", json.dumps(fields))
    for operation in (acquired(layer), layer.get("key")):
        with pytest.raises(IdempotencyInvalidStatusError, match="forget") as refused:
            await operation
        assert refused.value.key == "key"
    await layer.forget("key")
    assert (await claimed(layer)).owner == "ours"


async def test_a_value_of_another_type_is_refused(layer: RedisPersistenceLayer, client: Any) -> None:
    await client.rpush("key", "value")
    with pytest.raises(IdempotencyPersistenceConfigError, match=r"WRONGTYPE: .* key_prefix or database"):
        await claimed(layer)


async def test_a_text_that_only_redis_can_read_is_refused(layer: RedisPersistenceLayer, client: Any) -> None:
    await client.set("key", '{"status": "INPROGRESS", "expiration": 0x7fffffffff}')
    with pytest.raises(IdempotencyPersistenceLayerError, match=r"forget\(key\)"):
        await claimed(layer)
    await layer.forget("key")
    assert (await claimed(layer)).owner == "ours"


async def test_an_outcome_that_is_too_large_is_refused_before_it_is_sent(layer: RedisPersistenceLayer) -> None:
    record = await claimed(layer)
    with pytest.raises(IdempotencySerializationError, match=r"\d+ bytes"):
        await completed(layer, record, "x" * MAX_RECORD_BYTES)
    assert await layer.get("key") == record


# --- Fences ---------------------------------------------------------------------------------------------------------


async def test_the_fence_grows_over_a_release_though_the_clock_does_not(server: RedisServer, client: Any) -> None:
    clock = FakeClock()
    async with RedisPersistenceLayer(server.url, clock=clock) as layer:
        fences = list[int]()
        for owner in ("first", "second", "third"):
            claim = await layer.acquire(claim_of("key", now=clock(), owner=owner), now=clock())
            assert isinstance(claim, Claimed)
            assert not claim.taken_over
            fences.append(claim.record.fence)
            clock.advance(-3)  # the fence is remembered until the clock is past it
            assert await layer.release(claim.record)
            assert await layer.get("key") is None
    assert fences == [fences[0], fences[0] + 1, fences[0] + 2]


async def test_the_fence_of_a_released_claim_is_remembered_until_the_clock_is_past_it(
    layer: RedisPersistenceLayer, client: Any
) -> None:
    claim = await claimed(layer)
    fence = int(time.time() * 1000) + 5000
    await client.set("key", json.dumps(json.loads(await client.get("key")) | {"fence": fence}))
    assert await layer.release(claim)
    assert await client.get("key") == f"aidem:released:{fence}"
    assert 1 <= await client.pttl("key") <= 5001


async def test_a_fence_is_remembered_while_a_clock_that_was_given_stands_still(
    server: RedisServer, client: Any
) -> None:
    clock = FakeClock()
    async with RedisPersistenceLayer(server.url, clock=clock) as layer:
        claim = await layer.acquire(claim_of("key", now=clock()), now=clock())
        assert await layer.release(claim.record)
        assert 5_000 < await client.pttl("key") <= 10_000


async def test_a_release_leaves_nothing_behind_once_the_clock_is_past_its_fence(
    server: RedisServer, client: Any
) -> None:
    clock = FakeClock()
    async with RedisPersistenceLayer(server.url, clock=clock) as layer:
        claim = await layer.acquire(claim_of("key", now=clock()), now=clock())
        clock.advance(0.001)
        assert await layer.release(claim.record)
        assert await client.exists("key") == 0


async def test_the_fence_of_a_released_claim_is_remembered_for_seconds_at_most(
    server: RedisServer, client: Any
) -> None:
    clock = FakeClock()
    async with RedisPersistenceLayer(server.url, clock=clock) as layer:
        claim = await layer.acquire(claim_of("key", now=clock()), now=clock())
        clock.advance(-3600)  # the clock of a new primary is behind
        assert await layer.release(claim.record)
        assert 5_000 < await client.pttl("key") <= 10_000


async def test_a_fence_of_more_digits_than_redis_writes_by_itself_is_counted_on_exactly(
    layer: RedisPersistenceLayer, client: Any
) -> None:
    fence = 2**53 - 2
    await client.set("key", json.dumps(json.loads(lapsed("earlier")) | {"fence": fence}))
    assert (await claimed(layer)).fence == fence + 1


# --- Whose it is, and since when ------------------------------------------------------------------------------------


async def test_nobody_owns_a_record_whose_owner_is_empty(layer: RedisPersistenceLayer, client: Any) -> None:
    await client.set("key", json.dumps({"status": "INPROGRESS", "expiration": int(time.time()) + 60, "owner": ""}))
    nobody = claim_of("key", now=time.time(), owner=None)
    assert isinstance(await layer.acquire(nobody, now=time.time()), Blocked)
    assert not await completed(layer, nobody)
    assert not await layer.release(nobody)
    assert await layer.renew(nobody, now=time.time()) is None


async def test_a_claim_of_ours_that_has_expired_is_made_anew(server: RedisServer, client: Any) -> None:
    clock = FakeClock()
    async with RedisPersistenceLayer(server.url, clock=clock) as layer:
        first = await layer.acquire(claim_of("key", now=clock(), kept_seconds=60), now=clock())
        clock.advance(120)  # the server still has it: its own clock goes on as ever
        again = await layer.acquire(claim_of("key", now=clock()), now=clock())
        assert isinstance(again, Claimed)
        assert again.record.fence == first.record.fence + 1


async def test_what_blocks_is_judged_by_the_clock_of_the_server_and_the_answer_says_so(
    layer: RedisPersistenceLayer, client: Any
) -> None:
    await claimed(layer)
    ahead = time.time() + 3600
    answer = await layer.acquire(claim_of("key", now=ahead, owner="theirs"), now=ahead)
    assert isinstance(answer, Blocked)
    assert answer.now == pytest.approx((await client.time())[0], abs=30)


async def test_an_outcome_is_stored_and_a_claim_released_though_nobody_may_be_told(
    server: RedisServer, client: Any
) -> None:
    await client.acl_setuser(
        "quiet", enabled=True, passwords=["+word"], keys=["*"], categories=["+@all"], commands=["-publish"]
    )
    async with RedisPersistenceLayer(f"redis://quiet:word@127.0.0.1:{server.port}") as layer:
        assert await completed(layer, await claimed(layer))
        assert await layer.release(await claimed(layer, "other"))
        assert await layer.get("other") is None


# --- The lock of Powertools -----------------------------------------------------------------------------------------


def lapsed(owner: str | None = None) -> str:
    now = int(time.time())
    fields = {"status": "INPROGRESS", "expiration": now + 60, "in_progress_expiration": now * 1000 - 5000}
    return json.dumps(fields | ({"owner": owner} if owner else {}))


ORPHANS = [
    lapsed,
    lambda: json.dumps({"status": "COMPLETED", "expiration": int(time.time()) - 60, "data": '"old"'}),
    lambda: "no json",
]


@pytest.mark.parametrize("orphan", ORPHANS, ids=["lapsed", "expired", "undecodable"])
async def test_taking_an_orphan_over_sets_the_lock_that_powertools_looks_for(
    layer: RedisPersistenceLayer, client: Any, orphan: Any
) -> None:
    await client.set("key", orphan())
    await claimed(layer)
    assert await client.get("key:lock") == "aidem"
    assert 5 < await client.ttl("key:lock") <= 10


class Events:
    """A hook that notes what happened."""

    def __init__(self) -> None:
        self.kinds = list[EventKind]()

    def on_event(self, event: IdempotencyEvent) -> None:
        self.kinds.append(event.kind)


@pytest.mark.parametrize("text", [b"no json", b"[]", b'{"status": 5}', b"", b"\xff", b"aidem:released:soon"])
async def test_taking_over_a_text_that_is_no_record_is_told(
    server: RedisServer, client: Any, text: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    events = Events()
    async with RedisPersistenceLayer(server.url, shared_with_powertools=False) as layer:

        @idempotent_function(persistence_store=layer, config=IdempotencyConfig(hooks=(events,)))
        async def charge(order_id: str) -> str:
            return order_id

        await charge("o-1")
        (key,) = [key async for key in client.scan_iter()]
        caplog.clear()
        assert EventKind.TAKEN_OVER not in events.kinds
        await client.set(key, text)
        await charge("o-1")
    assert events.kinds.count(EventKind.TAKEN_OVER) == 1
    assert [record.getMessage() for record in caplog.records] == [
        f"Redis: a text that is no record stood under {key}, and gave way to a claim; see who writes it"
    ]


@pytest.mark.parametrize("value", [5, ["ours"], {"S": "ours"}, True])
@pytest.mark.parametrize("field", ["data", "owner", "validation"])
async def test_values_of_another_type_are_nobodys_and_no_results(
    layer: RedisPersistenceLayer, client: Any, field: str, value: object
) -> None:
    await client.set("key", json.dumps(json.loads(lapsed("earlier")) | {field: value}))
    record = await layer.get("key")
    assert record is not None
    name = {"data": "response_data", "validation": "payload_hash"}.get(field, field)
    assert getattr(record, name) == NOT_A_TEXT
    assert hash(record) == hash(record)


@pytest.mark.parametrize("orphan", ORPHANS, ids=["lapsed", "expired", "undecodable"])
async def test_an_orphan_that_powertools_has_locked_counts_as_running(
    layer: RedisPersistenceLayer, client: Any, orphan: Any
) -> None:
    text = orphan()
    await client.set("key", text)
    await client.set("key:lock", "True", ex=10)
    answer = await acquired(layer, payload_hash="ours")
    assert isinstance(answer, Blocked)
    assert answer.now is not None
    assert (answer.record.status, answer.record.response_data, answer.record.payload_hash) == (
        RecordStatus.INPROGRESS,
        None,
        "",
    )
    assert answer.record.in_progress_expiry_timestamp == pytest.approx((answer.now + 10) * 1000, abs=5000)
    assert await client.get("key") == text
    assert await client.get("key:lock") == "True"


async def test_an_orphan_that_powertools_has_locked_is_not_taken_over_to_resolve_it(
    layer: RedisPersistenceLayer, client: Any
) -> None:
    await client.set("key", lapsed("theirs"))
    found = await layer.get("key")
    assert found is not None
    await client.set("key:lock", "True", ex=10)
    now = time.time()
    for force in (False, True):
        assert await layer.take_over(found, claim_of("key", now=now), now=now, force=force) is None
    await client.set("key:lock", "aidem", ex=2)
    await taken_over(layer, found)
    assert await client.ttl("key:lock") > 5


async def test_a_lock_of_our_own_does_not_block_a_successor_and_is_kept_up(
    layer: RedisPersistenceLayer, client: Any
) -> None:
    await client.set("key", lapsed("earlier"))
    await client.set("key:lock", "aidem", ex=2)
    answer = await acquired(layer)
    assert isinstance(answer, Claimed)
    assert answer.taken_over
    assert await client.ttl("key:lock") > 5


async def test_a_first_claim_sets_no_lock(layer: RedisPersistenceLayer, client: Any) -> None:
    await client.set("key:lock", "True", ex=10)
    await claimed(layer)
    await claimed(layer, "other")
    assert await client.exists("other:lock") == 0


async def test_without_powertools_there_is_no_lock(server: RedisServer, client: Any) -> None:
    async with RedisPersistenceLayer(server.url, shared_with_powertools=False) as layer:
        await client.set("key", lapsed())
        await client.set("key:lock", "True", ex=10)
        await claimed(layer)
        await client.set("other", lapsed())
        await claimed(layer, "other")
        assert await client.exists("other:lock") == 0


# --- Options --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"decode_responses": True}, {"protocol": 3, "decode_responses": True}])
async def test_a_client_of_the_user_is_taken_as_a_pattern_and_left_alone(
    server: RedisServer, client: Any, options: dict[str, Any]
) -> None:
    from redis.asyncio import Redis

    own = Redis(port=server.port, db=3, **options)
    async with RedisPersistenceLayer(client=own) as layer:
        await completed(layer, await claimed(layer))
        assert [command async for command in own.scan_iter()] in ([b"key"], ["key"])
    assert await own.ping()  # it was not closed
    await own.flushall()
    await own.aclose()


async def test_host_and_the_rest_name_a_server_as_well_as_a_url(server: RedisServer, client: Any) -> None:
    async with RedisPersistenceLayer(host="127.0.0.1", port=server.port, db_index=5, ssl=False) as layer:
        await claimed(layer)
    async with RedisPersistenceLayer(f"redis://127.0.0.1:{server.port}/5") as layer:
        assert await layer.get("key") is not None
    assert await client.exists("key") == 0


class NotAClient:
    pass


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "needs a server: give it url, host or client"),
        ({"url": "http://user:secret@host"}, r"names no Redis server; write redis://"),
        ({"url": "redis://user:secret@host:port/0"}, r"names no Redis server; write redis://"),
        ({"url": NotAClient()}, r"url must be text, such as redis://host:6379/0; a client is passed as client="),
        ({"client": NotAClient()}, r"redis\.asyncio\.Redis or RedisCluster, not .*NotAClient"),
        ({"host": "host", "data_attr": "status"}, r"a name of its own: \['status'\] is used more than once"),
        ({"host": "host", "owner_attr": ""}, "every attribute needs a name: one of them is empty"),
    ],
)
def test_options_that_cannot_work_are_refused_at_once(options: dict[str, Any], message: str) -> None:
    with pytest.raises(IdempotencyPersistenceConfigError, match=message) as refused:
        RedisPersistenceLayer(**options)
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize(
    "url",
    [
        "redis://:sec/ret@host:6379/0",
        "redis://:1/secret@host:6379/0",
        "redis://:at@sec/ret@host:6379/0",
        "redis://:sec#ret@host:6379/0",
        "redis://:at@sec#ret@host",
        "redis://:at@secret#",
        "redis://:sec?ret@host:6379/0",
        "redis://:at@sec?ret@host:6379/0",
        "redis://:at@sec?ret=1@host:6379/0",
        "redis://user:secret\u2100@host:6379/0",
        "redis://user:[secret@host:6379/0",
        "unix://:sec/ret@/run/redis.sock",
        "redis+cluster://:sec/ret@host,host2",
        "redis+cluster://:at@sec#ret@host,host2",
        "redis+sentinel://:sec/ret@host/service/0",
        "redis+sentinel://:sec#ret@host/service/0",
    ],
)
def test_a_password_that_is_not_percent_encoded_is_refused_and_shown_nowhere(url: str) -> None:
    with pytest.raises(IdempotencyPersistenceConfigError, match="percent-encode @ : /") as refused:
        RedisPersistenceLayer(url)
    shown = "".join(traceback.format_exception(refused.value))
    assert not {part for part in ("sec/", "sec#", "sec?", "secret", "ret@") if part in shown}


@pytest.mark.parametrize(
    "url",
    [
        "redis://host/abc",
        "redis://host/0/1",
        "redis://host/-1",
        "redis://host?unknown=1",
        "redis://host?retry_everything=1",
        "redis://host?db=x",
        "redis://host?protocol=9",
        "rediss://host?ssl_cert_reqs=sometimes",
        "redis+cluster://host,host2?unknown=1",
        "redis+sentinel://host/service/abc",
        "redis+sentinel://host/service/0?unknown=1",
        "redis+sentinel://host/service/0?sentinel_unknown=1",
    ],
)
def test_what_redis_does_not_know_in_a_url_is_refused_at_once(url: str) -> None:
    with pytest.raises(IdempotencyPersistenceConfigError, match="Use no option that redis-py does not know"):
        RedisPersistenceLayer(url)


@pytest.mark.parametrize(
    "url",
    [
        "redis://host",
        "redis://host/",
        "redis://host:6379/12?client_name=payments&socket_connect_timeout=3&max_connections=4",
        "rediss://payments:p%40%2F%23%3F@host/0?ssl_check_hostname=False",
        "unix:///run/redis%40home.sock?db=1",
        "redis+cluster://payments:a@b@host:1,host2",
        "rediss+sentinel://host,host2/service?sentinel_password=secret&ssl_check_hostname=False",
    ],
)
def test_what_redis_knows_in_a_url_is_taken(url: str) -> None:
    RedisPersistenceLayer(url)


def test_a_client_that_leads_to_no_server_is_refused_at_once_and_the_memory_layer_named() -> None:
    with pytest.raises(
        IdempotencyPersistenceConfigError, match=r"fakeredis\..*Connection, .*MemoryPersistenceLayer\(\)"
    ):
        RedisPersistenceLayer(client=FakeAsyncRedis())


def test_what_is_set_on_a_layer_by_mistake_is_refused(server: RedisServer) -> None:
    layer: Any = RedisPersistenceLayer(server.url)
    with pytest.raises(AttributeError, match="client"):
        layer.client = NotAClient()


# --- Listing ----------------------------------------------------------------------------------------------------------


async def test_what_is_no_record_of_ours_is_not_listed(layer: RedisPersistenceLayer, client: Any) -> None:
    record = await claimed(layer, "pay#1")
    later = json.dumps({"status": "LATER"})
    texts = {
        "pay#2": "no json",
        "pay#3": "{}",
        "pay#4": later,
        "pay": lapsed(),
        "pay#5:lock": "aidem",
    }
    for key, text in texts.items():
        await client.set(key, text)
    await client.hset("pay#6", "status", "INPROGRESS")
    await client.lpush("pay#7", lapsed())
    await client.set(b"pay#\xff", lapsed())
    assert [found async for found in layer.scan()] == [record]


async def test_a_server_that_is_lost_while_it_is_listed_is_told() -> None:
    def answer(command: list[bytes]) -> bytes | None:
        return b"*2\r\n$1\r\n0\r\n*1\r\n$3\r\na#1\r\n" if command[0] == b"SCAN" else b"-OOM no memory\r\n"

    async with fake_server(answer) as fake:
        layer = RedisPersistenceLayer(fake.url)
        with pytest.raises(IdempotencyPersistenceConnectionError, match="out of memory"):
            [record async for record in layer.scan()]
        await layer.aclose()


async def test_a_key_that_the_server_names_twice_is_listed_once() -> None:
    cursors = iter([b"1", b"0"])

    def answer(command: list[bytes]) -> bytes | None:
        if command[0] == b"SCAN":
            return b"*2\r\n$1\r\n" + next(cursors) + b"\r\n*2\r\n$3\r\na#1\r\n$3\r\na#1\r\n"
        text = lapsed().encode()
        return b"$%d\r\n%s\r\n" % (len(text), text)

    async with fake_server(answer) as fake:
        layer = RedisPersistenceLayer(fake.url)
        assert [record.idempotency_key async for record in layer.scan()] == ["a#1"]
        assert [command[0] for command in fake.commands].count(b"SCAN") == 2
        await layer.aclose()


async def test_a_url_says_what_attributes_are_called(server: RedisServer, client: Any) -> None:
    layer = open_persistence_layer(f"{server.url}?owner_attr=the+owner&socket_keepalive=yes&note_attr=%C3%BC")
    assert isinstance(layer, RedisPersistenceLayer)
    async with layer:
        await claimed(layer, note="order 7")
    fields = await stored(client)
    assert (fields["the owner"], fields["ü"]) == ("ours", "order 7")
