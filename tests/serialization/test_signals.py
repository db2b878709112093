"""A signal handler's exception, such as Celery's soft time limit, while a value is turned into text or back.

The signals are real: what is turned into text sends one to its own process, and the handler raises in the middle of it.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from typing import Any, ClassVar
from uuid import UUID

import pydantic
import pytest

from aidem import IdempotencyConfig, idempotency, idempotent_function, sync
from aidem._rules.canonical_json import NotEncodableError, encode
from aidem._rules.record import OutcomeKind
from aidem.exceptions import IdempotencyResultUnavailableError
from aidem.persistence.memory import MemoryPersistenceLayer
from aidem.serialization import CustomDictSerializer


class SoftTimeLimitExceeded(Exception):  # noqa: N818 - Celery's name
    pass


class Limit:
    """A time limit that is reached when somebody says so: the handler raises, as Celery's does."""

    current: ClassVar[Limit]

    def __init__(self) -> None:
        self.strikes_at: set[int] = {1}
        self.calls = 0
        self.struck = 0

    def reach(self) -> None:
        self.calls += 1
        if self.calls in self.strikes_at:
            os.kill(os.getpid(), signal.SIGUSR1)

    def raise_it(self, *_: object) -> None:
        self.struck += 1
        raise SoftTimeLimitExceeded


@pytest.fixture(autouse=True)
def limit() -> Iterator[Limit]:
    limit = Limit()
    before = signal.signal(signal.SIGUSR1, limit.raise_it)
    Limit.current = limit
    yield limit
    signal.signal(signal.SIGUSR1, before)
    sync.close()


class Striking(UUID):
    """A value that the encoder replaces by its text."""

    def __str__(self) -> str:
        text = super().__str__()
        Limit.current.reach()
        return text


class Receipt(pydantic.BaseModel):
    number: int

    @pydantic.field_serializer("number")
    def dumped(self, number: int) -> int:
        Limit.current.reach()
        return number


def striking_serializer(*, method: str) -> CustomDictSerializer:
    def strike(data: Any) -> Any:
        Limit.current.reach()
        return data

    def keep(data: Any) -> Any:
        return data

    return CustomDictSerializer(
        to_dict=strike if method == "to_dict" else keep, from_dict=strike if method == "from_dict" else keep
    )


async def test_the_encoder_lets_through_what_it_does_not_explain(limit: Limit) -> None:
    with pytest.raises(SoftTimeLimitExceeded):
        encode({"a": [Striking(int=1)]})
    assert limit.struck == 1
    with pytest.raises(NotEncodableError, match="is of type bytes"):
        encode([Striking(int=1), b""])


RESULTS: list[tuple[Any, Any, str | None]] = [
    ({"id": Striking(int=1)}, {"id": str(UUID(int=1))}, None),
    (Receipt(number=5), {"number": 5}, None),
    ([1], [1], "to_dict"),
    ([1], [1], "from_dict"),
]


def by_function(layer: MemoryPersistenceLayer, result: Any, serializer: Any, config: IdempotencyConfig) -> Any:
    @sync.idempotent_function(persistence_store=layer, output_serializer=serializer, config=config, key_prefix="charge")
    def charge() -> Any:
        return result()

    return charge()


def by_run(layer: MemoryPersistenceLayer, result: Any, serializer: Any, config: IdempotencyConfig) -> Any:
    with sync.idempotency("charge", persistence_store=layer, output_serializer=serializer, config=config) as execution:
        return execution.run(result)


def by_block(layer: MemoryPersistenceLayer, result: Any, serializer: Any, config: IdempotencyConfig) -> Any:
    with sync.idempotency("charge", persistence_store=layer, output_serializer=serializer, config=config) as execution:
        if not execution.replayed:
            execution.result = result()
    return execution.result


async def by_async_function(
    layer: MemoryPersistenceLayer, result: Any, serializer: Any, config: IdempotencyConfig
) -> Any:
    @idempotent_function(persistence_store=layer, output_serializer=serializer, config=config, key_prefix="charge")
    async def charge() -> Any:
        return result()

    return await charge()


async def by_async_run(layer: MemoryPersistenceLayer, result: Any, serializer: Any, config: IdempotencyConfig) -> Any:
    async def charge() -> Any:
        return result()

    block = idempotency("charge", persistence_store=layer, output_serializer=serializer, config=config)
    async with block as execution:
        return await execution.run(charge)


async def by_async_block(layer: MemoryPersistenceLayer, result: Any, serializer: Any, config: IdempotencyConfig) -> Any:
    block = idempotency("charge", persistence_store=layer, output_serializer=serializer, config=config)
    async with block as execution:
        if not execution.replayed:
            execution.result = result()
    return execution.result


Front = Callable[..., Any]
SYNC = [by_function, by_run, by_block]
ASYNC = [by_async_function, by_async_run, by_async_block]


class Effect:
    def __init__(self, result: Any) -> None:
        self.result = result
        self.runs = 0

    def __call__(self) -> Any:
        self.runs += 1
        return self.result


@pytest.mark.parametrize("on_abandoned", ["run_again", "raise"])
@pytest.mark.parametrize("case", RESULTS, ids=range(len(RESULTS)))
@pytest.mark.parametrize("front", SYNC)
def test_a_limit_that_strikes_after_a_body_is_raised_once_the_result_is_recorded(
    front: Front, case: tuple[Any, Any, str | None], on_abandoned: Any, limit: Limit
) -> None:
    result, replayed, method = case
    layer, effect = MemoryPersistenceLayer(), Effect(result)
    serializer = None if method is None else striking_serializer(method=method)
    config = IdempotencyConfig(on_abandoned=on_abandoned)
    with pytest.raises(SoftTimeLimitExceeded):
        front(layer, effect, serializer, config)
    assert limit.struck == 1
    assert front(layer, effect, serializer, config) == replayed
    assert effect.runs == 1


@pytest.mark.parametrize("case", RESULTS, ids=range(len(RESULTS)))
@pytest.mark.parametrize("front", ASYNC)
async def test_a_limit_that_strikes_after_an_async_body_is_raised_once_the_result_is_recorded(
    front: Front, case: tuple[Any, Any, str | None], limit: Limit
) -> None:
    result, replayed, method = case
    layer, effect, config = MemoryPersistenceLayer(), Effect(result), IdempotencyConfig(on_abandoned="raise")
    serializer = None if method is None else striking_serializer(method=method)
    with pytest.raises(SoftTimeLimitExceeded):
        await front(layer, effect, serializer, config)
    assert limit.struck == 1
    assert await front(layer, effect, serializer, config) == replayed
    assert effect.runs == 1


@pytest.mark.parametrize("method", ["to_dict", "from_dict"])
@pytest.mark.parametrize("front", SYNC)
def test_where_limits_strike_again_and_again_the_effect_still_happens_once(
    front: Front, method: str, limit: Limit, caplog: pytest.LogCaptureFixture
) -> None:
    layer, effect, config = MemoryPersistenceLayer(), Effect([1]), IdempotencyConfig()
    limit.strikes_at = {1, 3}  # the second time it is asked whether it fails by itself
    serializer = striking_serializer(method=method)
    with pytest.raises(SoftTimeLimitExceeded):
        front(layer, effect, serializer, config)
    assert limit.struck == 2
    assert "SoftTimeLimitExceeded was raised while it was turned into text" in caplog.text
    (record,) = layer.records().values()
    assert record.outcome is OutcomeKind.UNAVAILABLE
    with pytest.raises(IdempotencyResultUnavailableError):
        front(layer, effect, serializer, config)
    assert effect.runs == 1


def test_a_limit_that_strikes_in_a_replay_is_raised_and_the_next_replay_has_the_result(limit: Limit) -> None:
    layer, effect, config = MemoryPersistenceLayer(), Effect([1]), IdempotencyConfig()
    limit.strikes_at = {2}
    serializer = striking_serializer(method="from_dict")
    assert by_function(layer, effect, serializer, config) == [1]
    with pytest.raises(SoftTimeLimitExceeded):
        by_function(layer, effect, serializer, config)
    assert limit.struck == 1
    assert by_function(layer, effect, serializer, config) == [1]


def test_a_limit_that_strikes_while_a_key_is_made_is_raised_and_nothing_has_run(limit: Limit) -> None:
    runs: list[Any] = []
    layer = MemoryPersistenceLayer()

    @sync.idempotent_function(data_keyword_argument="order", persistence_store=layer)
    def charge(order: Any) -> None:
        runs.append(order)

    with pytest.raises(SoftTimeLimitExceeded):
        charge({"id": Striking(int=1)})
    assert limit.struck == 1
    assert not layer.records()
    charge({"id": Striking(int=1)})
    assert len(runs) == 1


class DeclinedError(Exception):
    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        Limit.current.reach()


def test_a_limit_that_strikes_while_a_stored_exception_is_made_again_is_raised(limit: Limit) -> None:
    limit.strikes_at = {3}  # made by the body, by the check that it can be made again, by the replay
    layer, config = MemoryPersistenceLayer(), IdempotencyConfig(stored_exceptions=(DeclinedError,))

    @sync.idempotent_function(persistence_store=layer, config=config)
    def charge() -> None:
        raise DeclinedError("no funds")

    for expected in (DeclinedError, SoftTimeLimitExceeded, DeclinedError):
        with pytest.raises(expected):
            charge()
    assert limit.struck == 1
