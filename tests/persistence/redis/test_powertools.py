"""Two fleets on one server: functions on AWS Powertools, and the same functions on aidem."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import redis
from aws_lambda_powertools.utilities.idempotency import IdempotencyConfig as TheirConfig
from aws_lambda_powertools.utilities.idempotency import exceptions as theirs
from aws_lambda_powertools.utilities.idempotency import idempotent_function as their_idempotent_function
from aws_lambda_powertools.utilities.idempotency.persistence.redis import RedisCachePersistenceLayer as TheirLayer

from aidem import IdempotencyConfig, idempotent_function
from aidem._rules.lifecycle import Blocked, Claimed
from aidem.exceptions import (
    IdempotencyAlreadyInProgressError,
    IdempotencyResultUnavailableError,
    IdempotencyValidationError,
)
from aidem.persistence.redis import RedisPersistenceLayer
from tests.support.redis import acquired, claimed, until
from tests.support.servers import RedisServer, started

pytestmark = [
    pytest.mark.server,
    pytest.mark.filterwarnings("ignore:Redis.* will be removed in v4:DeprecationWarning"),
]

CONFLICTS = (theirs.IdempotencyAlreadyInProgressError, IdempotencyAlreadyInProgressError)
MISMATCHES = (theirs.IdempotencyValidationError, IdempotencyValidationError)
LEASE_SECONDS = 0.02


@pytest.fixture(scope="module", params=["redis", "valkey"])
def server(request: pytest.FixtureRequest) -> Iterator[RedisServer]:
    with started(request.param) as server:
        yield server


@pytest.fixture
def cache(server: RedisServer) -> Iterator[Any]:
    with redis.Redis(port=server.port, decode_responses=True) as cache:
        cache.flushall()
        yield cache


class Abandoned(BaseException):
    """The process dies: Powertools gives the key back for `Exception` alone."""


@dataclass
class Invocation:
    """The part of a Lambda context that Powertools asks."""

    remaining_seconds: float

    def get_remaining_time_in_millis(self) -> int:
        return int(self.remaining_seconds * 1000)


@dataclass
class Body:
    """What the function of a fleet does; returns what it is told."""

    result: Any = None
    act: Callable[[], Any] = lambda: None
    calls: list[Any] = field(default_factory=list)

    def __call__(self, order: Any) -> Any:
        self.calls.append(order)
        self.act()
        return self.result


class Powertools:
    """The fleet that is there already."""

    def __init__(
        self,
        server: RedisServer,
        body: Body,
        *,
        lease: bool = False,
        client: type[redis.Redis] = redis.Redis,
        **config: Any,
    ) -> None:
        layer = TheirLayer(client=client(port=server.port, decode_responses=True))  # type: ignore[arg-type]
        their_config = TheirConfig(lambda_context=Invocation(LEASE_SECONDS if lease else 30), **config)  # type: ignore[arg-type]

        @their_idempotent_function(
            data_keyword_argument="order", persistence_store=layer, config=their_config, key_prefix="pay"
        )
        def pay(order: Any) -> Any:
            return body(order)

        self._pay = pay

    async def call(self, order: Any) -> Any:
        return await asyncio.to_thread(self._pay, order=order)


class Aidem:
    """The fleet that moves over."""

    def __init__(self, server: RedisServer, body: Body, *, lease: bool = False, **config: Any) -> None:
        our_config = IdempotencyConfig(
            hash_function="md5", lease_seconds=1.0 if lease else 30.0, renew_lease=False, **config
        )

        @idempotent_function(
            data_keyword_argument="order",
            persistence_store=RedisPersistenceLayer(server.url),
            config=our_config,
            key_prefix="pay",
        )
        async def pay(order: Any) -> Any:
            return await asyncio.to_thread(body, order)

        self.call = pay


both_directions = pytest.mark.parametrize(
    ("first_fleet", "second_fleet"), [(Powertools, Aidem), (Aidem, Powertools)], ids=["they-first", "we-first"]
)


def fail() -> None:
    raise RuntimeError


async def abandon(fleet: Any, server: RedisServer, cache: Any) -> str:
    """Leave a lapsed claim behind; return its key."""

    def die() -> None:
        raise Abandoned

    if fleet is Powertools:
        with pytest.raises(Abandoned):
            await fleet(server, Body(act=die), lease=True).call({"id": 1})
    else:
        gone = RedisPersistenceLayer(server.url)
        await claimed(gone, await key_of(server, cache), lease_seconds=0)
        await gone.aclose()
    (key,) = cache.keys("pay#*")
    fields = json.loads(cache.get(key))
    assert fields["status"] == "INPROGRESS"
    await until_passed(cache, fields["in_progress_expiration"])
    return str(key)


async def key_of(server: RedisServer, cache: Any) -> str:
    """Return the key that both fleets give to the order, leaving nothing behind."""
    await Powertools(server, Body()).call({"id": 1})
    (key,) = cache.keys("pay#*")
    cache.flushall()
    return str(key)


async def until_passed(cache: Any, instant: int) -> None:
    """Let the server's clock go past an instant in milliseconds."""

    async def has_passed() -> bool:
        seconds, microseconds = cache.time()
        return bool(seconds * 1000 + microseconds // 1000 > instant)

    await until(has_passed)


@both_directions
async def test_each_replays_what_the_other_completed(
    first_fleet: Any, second_fleet: Any, server: RedisServer, cache: Any
) -> None:
    results = [
        {"text": "Zürich 東京 🐙", "list": [None, 1, 2.5, True]},
        [1, "two"],
        9_007_199_254_740_993,
        "text",
        None,
    ]
    second_body = Body()
    for number, result in enumerate(results):
        assert await first_fleet(server, Body(result)).call({"id": number}) == result
        assert await second_fleet(server, second_body).call({"id": number}) == result
    assert second_body.calls == []


@both_directions
async def test_each_respects_what_the_other_runs(
    first_fleet: Any, second_fleet: Any, server: RedisServer, cache: Any
) -> None:
    entered, go_on = threading.Event(), threading.Event()

    def hold() -> None:
        entered.set()
        assert go_on.wait(30)

    first = asyncio.ensure_future(first_fleet(server, Body("first", hold)).call({"id": 1}))
    assert await asyncio.to_thread(entered.wait, 30)
    second_body = Body("second")
    with pytest.raises(CONFLICTS):
        await second_fleet(server, second_body).call({"id": 1})
    go_on.set()
    assert await first == "first"
    assert await second_fleet(server, second_body).call({"id": 1}) == "first"
    assert second_body.calls == []


@both_directions
async def test_each_gets_the_key_that_the_other_gave_back(
    first_fleet: Any, second_fleet: Any, server: RedisServer, cache: Any
) -> None:
    with pytest.raises(RuntimeError):
        await first_fleet(server, Body(act=fail)).call({"id": 1})
    assert await second_fleet(server, Body("second")).call({"id": 1}) == "second"


@both_directions
async def test_each_takes_over_what_the_other_abandoned(
    first_fleet: Any, second_fleet: Any, server: RedisServer, cache: Any
) -> None:
    key = await abandon(first_fleet, server, cache)
    assert await second_fleet(server, Body("second")).call({"id": 1}) == "second"
    assert cache.get(f"{key}:lock") == ("True" if second_fleet is Powertools else "aidem")
    assert await first_fleet(server, Body("first")).call({"id": 1}) == "second"


@both_directions
async def test_of_many_callers_of_both_fleets_one_takes_an_orphan_over(
    first_fleet: Any, second_fleet: Any, server: RedisServer, cache: Any
) -> None:
    body = Body("once")
    fleets = [fleet(server, body) for fleet in (first_fleet, second_fleet) * 4]
    for round_ in range(5):
        cache.flushall()
        body.calls.clear()
        await abandon(first_fleet, server, cache)
        answers = await asyncio.gather(*(fleet.call({"id": 1}) for fleet in fleets), return_exceptions=True)
        assert body.calls == [{"id": 1}], round_
        unexpected = [answer for answer in answers if answer != "once" and not isinstance(answer, CONFLICTS)]
        assert unexpected == []


async def test_powertools_does_not_overwrite_an_orphan_that_we_took_over_after_it_had_looked(
    server: RedisServer, cache: Any
) -> None:
    key = await abandon(Powertools, server, cache)
    ours = RedisPersistenceLayer(server.url)

    class Slow(redis.Redis):
        """Powertools looks at the orphan; then, before it locks it, we take it over."""

        def get(self, name: Any) -> Any:
            found = super().get(name)
            assert isinstance(asyncio.run(acquired(ours, key, "ours")), Claimed)
            return found

    body = Body("theirs")
    with pytest.raises(theirs.IdempotencyAlreadyInProgressError):
        await Powertools(server, body, client=Slow).call({"id": 1})
    assert body.calls == []
    assert json.loads(cache.get(key))["owner"] == "ours"


async def test_an_orphan_that_powertools_is_taking_over_is_left_to_it(server: RedisServer, cache: Any) -> None:
    key = await abandon(Aidem, server, cache)
    ours = RedisPersistenceLayer(server.url)
    answers = list[Any]()

    class Slow(redis.Redis):
        """Powertools has locked the orphan; before it overwrites it, we ask for it."""

        def set(self, name: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
            if name == key and not kwargs.get("nx") and not answers:
                answers.append(asyncio.run(acquired(ours, key, "another")))
            return super().set(name, value, *args, **kwargs)

    assert await Powertools(server, Body("theirs"), client=Slow).call({"id": 1}) == "theirs"
    assert isinstance(answers[0], Blocked)


@both_directions
async def test_a_late_owner_of_ours_changes_nothing_and_one_of_powertools_overwrites_and_is_not_overwritten(
    first_fleet: Any, second_fleet: Any, server: RedisServer, cache: Any
) -> None:
    entered, go_on = threading.Event(), threading.Event()

    def hold() -> None:
        entered.set()
        assert go_on.wait(30)

    late = asyncio.ensure_future(first_fleet(server, Body("late", hold), lease=True).call({"id": 1}))
    assert await asyncio.to_thread(entered.wait, 30)
    (key,) = cache.keys("pay#*")
    await until_passed(cache, json.loads(cache.get(key))["in_progress_expiration"])
    assert await second_fleet(server, Body("winner")).call({"id": 1}) == "winner"
    go_on.set()
    assert await late == ("late" if first_fleet is Powertools else "winner")  # it does not ask
    assert json.loads(json.loads(cache.get(key))["data"]) == ("late" if first_fleet is Powertools else "winner")


@pytest.mark.parametrize("text", ["aidem:exception:{}", "aidem:unavailable"])
async def test_powertools_does_not_take_an_outcome_without_result_for_one(
    server: RedisServer, cache: Any, text: str
) -> None:
    @idempotent_function(
        data_keyword_argument="order",
        persistence_store=RedisPersistenceLayer(server.url),
        config=IdempotencyConfig(hash_function="md5", stored_exceptions=(RuntimeError,)),
        key_prefix="pay",
    )
    async def pay(order: Any) -> Any:
        if text == "aidem:unavailable":
            return object()
        raise RuntimeError

    if text == "aidem:unavailable":
        with pytest.warns(UserWarning, match="stored"):
            await pay(order={"id": 1})
    else:
        with pytest.raises(RuntimeError):
            await pay(order={"id": 1})
    body = Body("ran again")
    with pytest.raises(Exception, match=r".*") as refused:
        await Powertools(server, body).call({"id": 1})
    assert isinstance(refused.value, (theirs.IdempotencyPersistenceLayerError, ValueError))
    assert body.calls == []
    with pytest.raises((RuntimeError, IdempotencyResultUnavailableError)):
        await pay(order={"id": 1})


async def test_a_payload_that_differs_from_the_one_that_powertools_saw_running_is_refused(
    server: RedisServer, cache: Any
) -> None:
    entered, go_on = threading.Event(), threading.Event()

    def hold() -> None:
        entered.set()
        assert go_on.wait(30)

    options: dict[str, Any] = {"event_key_jmespath": "id", "payload_validation_jmespath": "amount"}
    first = asyncio.ensure_future(Powertools(server, Body("first", hold), **options).call({"id": 1, "amount": 2}))
    assert await asyncio.to_thread(entered.wait, 30)
    with pytest.raises(IdempotencyValidationError):
        await Aidem(server, Body(), **options).call({"id": 1, "amount": 3})
    go_on.set()
    assert await first == "first"
    # Powertools drops the hash when it completes; what is not there is not compared.
    assert await Aidem(server, Body(), **options).call({"id": 1, "amount": 2}) == "first"


async def test_the_text_of_a_release_is_an_orphan_to_powertools(server: RedisServer, cache: Any) -> None:
    key = await key_of(server, cache)
    cache.set(key, "aidem:released:1800000000000", px=60_000)
    async with RedisPersistenceLayer(server.url) as layer:
        assert await layer.get(key) is None
    assert await Powertools(server, Body("theirs")).call({"id": 1}) == "theirs"
