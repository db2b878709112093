"""`async with idempotency(...)`: what a block runs, records and replays, and what it refuses."""

# ruff: noqa: PT031 - what is under test is a block, and its body belongs to it

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from aidem import (
    Execution,
    IdempotencyConfig,
    RecordStatus,
    configure,
    current_execution,
    idempotency,
    idempotent_function,
)
from aidem.exceptions import (
    IdempotencyAlreadyInProgressError,
    IdempotencyConfigError,
    IdempotencyKeyError,
    IdempotencyLeaseLostError,
    IdempotencyNoSerializationModelError,
    IdempotencyResultUnavailableError,
    IdempotencyUsageError,
    IdempotencyValidationError,
    IdempotencyWarning,
)
from aidem.persistence.memory import MemoryPersistenceLayer
from aidem.serialization import DataclassSerializer, PydanticSerializer
from aidem.testing import FakeClock
from tests.support.planned import PlannedLayer, Till
from tests.support.records import put

if TYPE_CHECKING:
    from collections.abc import Iterator

    from aidem import BlockExecution, DataRecord

ORDER = {"id": 7, "amount": 10}


@dataclass
class Receipt:
    number: int


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def layer(clock: FakeClock) -> MemoryPersistenceLayer:
    return MemoryPersistenceLayer(clock=clock)


@pytest.fixture(autouse=True)
def defaults(layer: MemoryPersistenceLayer) -> Iterator[None]:
    configure(persistence_store=layer)
    yield
    configure()


@pytest.fixture
def till() -> Till:
    return Till()


def stored(layer: MemoryPersistenceLayer) -> list[DataRecord]:
    return list(layer.records().values())


async def receipt() -> Receipt:
    return Receipt(number=1)


# --- run --------------------------------------------------------------------------------------------------------------


async def test_run_calls_the_function_once_and_hands_back_what_it_returned(till: Till) -> None:
    async def call() -> Any:
        async with idempotency("order-7") as execution:
            return await execution.run(till.charge, ORDER)

    assert await call() == await call() == {"receipt": 1}
    assert till.charges == [ORDER]


async def test_run_passes_positional_and_keyword_arguments() -> None:
    async def charge(*args: int, **kwargs: int) -> list[Any]:
        return [list(args), kwargs]

    async with idempotency("key") as execution:
        assert await execution.run(charge, 1, 2, func=3, self=4) == [[1, 2], {"func": 3, "self": 4}]


async def test_run_returns_on_the_first_call_what_a_replay_returns() -> None:
    async def charge() -> Any:
        return (1, 2)

    for _ in range(2):
        async with idempotency("key") as execution:
            assert await execution.run(charge) == [1, 2]


async def test_run_rebuilds_the_result_by_the_return_annotation_of_the_function() -> None:
    for _ in range(2):
        async with idempotency("key") as execution:
            assert await execution.run(receipt) == Receipt(number=1)
        assert execution.result == Receipt(number=1)


async def test_the_output_serializer_of_the_block_goes_before_the_annotation_of_the_function() -> None:
    for _ in range(2):
        async with idempotency("key", output_serializer=DataclassSerializer(list[Receipt] | None)) as execution:
            assert await execution.run(many) == [Receipt(1), Receipt(2)]


async def many() -> list[Any]:
    return [Receipt(1), Receipt(2)]


async def test_a_serializer_class_has_no_annotation_to_take_and_is_refused_before_the_block() -> None:
    with pytest.raises(IdempotencyNoSerializationModelError):
        async with idempotency("key", output_serializer=PydanticSerializer):  # type: ignore[arg-type]
            pytest.fail("the block ran")


@pytest.mark.parametrize("replayed", [False, True])
async def test_run_is_for_one_function(till: Till, replayed: bool) -> None:
    if replayed:
        async with idempotency("key") as execution:
            await execution.run(till.charge, ORDER)
    with pytest.raises(IdempotencyUsageError, match=r"run\(\) was called before"):
        async with idempotency("key") as execution:
            await execution.run(till.charge, ORDER)
            await execution.run(till.charge, ORDER)
    assert len(till.charges) == 1


async def test_what_is_done_to_the_value_of_run_changes_no_replay(till: Till) -> None:
    async with idempotency("key") as execution:
        value = await execution.run(till.charge, ORDER)
        value["receipt"] = 2
    assert execution.result == {"receipt": 1}
    async with idempotency("key") as execution:
        assert await execution.run(till.charge, ORDER) == {"receipt": 1}


async def test_the_result_of_run_can_be_replaced(till: Till) -> None:
    async with idempotency("key") as execution:
        value = await execution.run(till.charge, ORDER)
        execution.result = [value, "sent"]
    assert execution.result == [{"receipt": 1}, "sent"]
    async with idempotency("key") as execution:
        assert execution.result == [{"receipt": 1}, "sent"]


async def test_a_result_of_run_that_cannot_be_stored_reaches_the_first_caller_alone(
    caplog: pytest.LogCaptureFixture,
) -> None:
    thing = object()

    async def charge() -> object:
        return thing

    with pytest.warns(IdempotencyWarning, match="could not be stored"):
        async with idempotency("key") as execution:
            assert await execution.run(charge) is thing
    assert execution.result is thing
    assert [record.levelname for record in caplog.records] == ["ERROR"]
    async with idempotency("key") as execution:
        with pytest.raises(IdempotencyResultUnavailableError):
            await execution.run(charge)


async def test_run_takes_a_function_that_turns_out_not_to_be_async() -> None:
    layer = PlannedLayer()
    calls: list[int] = []

    def charge() -> Any:
        calls.append(1)
        return {"receipt": 1}

    async def pay() -> Any:
        async with idempotency("k", persistence_store=layer) as execution:
            return await execution.run(charge)

    assert await pay() == await pay() == {"receipt": 1}
    assert calls == [1]


# --- Step by step -----------------------------------------------------------------------------------------------------


async def charge_step_by_step(till: Till, key: Any = "order-7", **options: Any) -> BlockExecution:
    async with idempotency(key, **options) as execution:
        if not execution.replayed:
            execution.result = await till.charge(ORDER)
    return execution


async def test_a_block_that_looks_at_replayed_runs_once(till: Till) -> None:
    first, second = await charge_step_by_step(till), await charge_step_by_step(till)
    assert (first.replayed, second.replayed) == (False, True)
    assert first.result == second.result == {"receipt": 1}
    assert len(till.charges) == 1


async def test_after_the_block_the_result_is_what_a_replay_gets() -> None:
    async with idempotency("key") as execution:
        assert execution.result is None
        result: Any = {1: (2, 3)}
        execution.result = result
        assert execution.result is result
    assert execution.result == {"1": [2, 3]}


async def test_a_result_that_changes_until_the_block_is_left_is_recorded_as_it_is_then() -> None:
    async with idempotency("key") as execution:
        assert not execution.replayed
        execution.result = steps = ["reserved"]
        steps.append("charged")
    async with idempotency("key") as execution:
        assert execution.result == ["reserved", "charged"]


async def test_a_block_without_a_result_records_none() -> None:
    for replayed in (False, True):
        async with idempotency("key") as execution:
            assert execution.replayed is replayed
        assert execution.result is None


async def test_a_result_that_cannot_be_stored_stays_with_the_first_block() -> None:
    thing = object()
    with pytest.warns(IdempotencyWarning, match="the block 'aidem' could not be stored"):
        async with idempotency("key") as execution:
            assert not execution.replayed
            execution.result = thing
    assert execution.result is thing
    async with idempotency("key") as execution:
        assert execution.replayed
        with pytest.raises(IdempotencyResultUnavailableError):
            _ = execution.result


async def test_setting_the_result_of_a_replay_is_refused(till: Till) -> None:
    await charge_step_by_step(till)
    with pytest.raises(IdempotencyUsageError, match=r"this is a replay, .*if not execution\.replayed"):
        async with idempotency("order-7") as execution:
            execution.result = await till.charge(ORDER)
    async with idempotency("order-7") as execution:
        assert execution.result == {"receipt": 1}


async def test_setting_the_result_after_the_block_is_refused(till: Till) -> None:
    execution = await charge_step_by_step(till)
    with pytest.raises(IdempotencyUsageError, match="the block is over"):
        execution.result = 1
    assert execution.result == {"receipt": 1}


async def test_a_replayed_result_is_one_object_of_its_own_block(till: Till) -> None:
    executions = [await charge_step_by_step(till) for _ in range(3)]
    executions[1].result["receipt"] = 2
    assert executions[1].result == {"receipt": 2}
    assert executions[2].result == {"receipt": 1}


# --- A block without protection ---------------------------------------------------------------------------------------


async def test_a_block_that_never_looked_is_told_so_on_the_first_run_after_recording(till: Till) -> None:
    with pytest.raises(IdempotencyUsageError, match=r"await execution\.run"):
        async with idempotency("key") as execution:
            execution.result = await till.charge(ORDER)
    assert execution.result == {"receipt": 1}
    async with idempotency("key") as execution:
        assert execution.replayed


async def test_a_block_that_never_looked_is_told_so_on_a_replay(till: Till) -> None:
    await charge_step_by_step(till)
    with pytest.raises(IdempotencyUsageError, match="never asked"):
        async with idempotency("order-7"):
            await till.charge(ORDER)


async def test_a_block_that_never_looked_and_fails_raises_its_own_error(till: Till, layer: Any) -> None:
    till.error = LookupError("declined")
    with pytest.raises(LookupError, match="declined"):
        async with idempotency("key"):
            await till.charge(ORDER)
    assert stored(layer) == []


@pytest.mark.parametrize("look", ["replayed", "result"])
async def test_a_look_is_enough(look: str) -> None:
    async with idempotency("key") as execution:
        getattr(execution, look)


async def test_other_facts_of_the_execution_are_no_look() -> None:
    with pytest.raises(IdempotencyUsageError, match="never asked"):
        async with idempotency("key") as execution:
            assert execution.key
            assert execution.fence
            assert execution.record
            await execution.ensure_owned()


# --- Failures ---------------------------------------------------------------------------------------------------------


async def test_a_failing_block_gives_the_key_back(till: Till, layer: MemoryPersistenceLayer) -> None:
    till.error = error = LookupError("declined")
    with pytest.raises(LookupError) as caught:
        await charge_step_by_step(till)
    assert caught.value is error
    assert stored(layer) == []
    till.error = None
    assert (await charge_step_by_step(till)).result == {"receipt": 2}


async def test_a_block_that_is_cancelled_gives_the_key_back(layer: MemoryPersistenceLayer) -> None:
    async def wait() -> None:
        async with idempotency("key") as execution:
            await execution.run(asyncio.Event().wait)

    task = asyncio.ensure_future(wait())
    await asyncio.sleep(0)
    assert len(stored(layer)) == 1
    task.cancel()
    await asyncio.wait([task])
    assert task.cancelled()
    assert stored(layer) == []


async def test_a_stored_exception_is_raised_again_by_run_and_by_result(till: Till) -> None:
    config = IdempotencyConfig(stored_exceptions=(LookupError,))
    till.error = LookupError("declined")
    with pytest.raises(LookupError, match="declined"):
        await charge_step_by_step(till, config=config)
    async with idempotency("order-7", config=config) as execution:
        assert execution.replayed
        with pytest.raises(LookupError, match="declined"):
            _ = execution.result
        with pytest.raises(LookupError, match="declined"):
            await execution.run(till.charge, ORDER)
    assert len(till.charges) == 1


async def test_a_second_block_with_the_key_of_a_running_one_is_refused(till: Till) -> None:
    async with idempotency("key") as execution:
        assert not execution.replayed
        with pytest.raises(IdempotencyAlreadyInProgressError):
            async with idempotency("key"):
                pytest.fail("the block ran")


async def test_a_block_object_is_entered_once(till: Till) -> None:
    block = idempotency("key")
    async with block as execution:
        await execution.run(till.charge, ORDER)
    with pytest.raises(IdempotencyUsageError, match=r"call idempotency\(\.\.\.\) for every block"):
        async with block:
            pytest.fail("the block ran")


async def test_a_block_that_swallows_the_failure_of_run_records_nothing() -> None:
    layer, till = PlannedLayer(), Till()
    till.error = ValueError("declined")
    with pytest.raises(IdempotencyUsageError, match="swallowed"):
        async with idempotency("k", persistence_store=layer) as execution:
            with pytest.raises(ValueError, match="declined"):
                await execution.run(till.charge, ORDER)
    assert not layer.inner.records()


async def test_a_block_may_turn_the_failure_of_run_into_a_result() -> None:
    layer, till = PlannedLayer(), Till()
    till.error = ValueError("declined")
    for _ in range(2):
        async with idempotency("k", persistence_store=layer) as execution:
            if not execution.replayed:
                with pytest.raises(ValueError, match="declined"):
                    await execution.run(till.charge, ORDER)
                execution.result = "declined"
        assert execution.result == "declined"
    assert len(till.charges) == 1


# --- A block whose claim was lost -------------------------------------------------------------------------------------


async def take_over(layer: MemoryPersistenceLayer, response_data: str) -> None:
    (record,) = stored(layer)
    winner = record.replace(owner="winner")
    put(layer, winner)
    completed = winner.replace(status=RecordStatus.COMPLETED, response_data=response_data)
    assert await layer.complete(completed, now=layer.clock())


async def test_a_block_that_lost_its_claim_has_the_winners_result(till: Till, layer: MemoryPersistenceLayer) -> None:
    async with idempotency("key") as execution:
        assert not execution.replayed
        execution.result = await till.charge(ORDER)
        await take_over(layer, '"the winner\'s"')
    assert execution.result == "the winner's"


async def test_a_block_that_handed_out_another_result_than_the_winners_raises(
    till: Till, layer: MemoryPersistenceLayer
) -> None:
    with pytest.raises(IdempotencyLeaseLostError, match="has another outcome"):
        async with idempotency("key") as execution:
            await execution.run(till.charge, ORDER)
            await take_over(layer, '"the winner\'s"')


async def test_a_block_that_lost_its_claim_to_another_payload_has_no_result(
    till: Till, layer: MemoryPersistenceLayer
) -> None:
    with pytest.raises(IdempotencyLeaseLostError, match="no outcome for this payload"):
        async with idempotency("key", payload=ORDER) as execution:
            assert not execution.replayed
            execution.result = await till.charge(ORDER)
            (record,) = stored(layer)
            put(layer, record.replace(owner="winner", payload_hash="another"))


async def test_a_block_that_handed_out_the_winners_result_is_content(till: Till, layer: MemoryPersistenceLayer) -> None:
    async with idempotency("key") as execution:
        await execution.run(till.charge, ORDER)
        await take_over(layer, '{"receipt": 1}')
    assert execution.result == {"receipt": 1}


async def test_a_block_whose_stored_exception_does_not_count_says_that_another_outcome_does(
    till: Till, layer: MemoryPersistenceLayer
) -> None:
    config = IdempotencyConfig(stored_exceptions=(LookupError,))
    error = LookupError("declined")
    with pytest.raises(IdempotencyLeaseLostError, match="has another outcome") as caught:
        async with idempotency("key", config=config) as execution:
            assert not execution.replayed
            await take_over(layer, '"the winner\'s"')
            raise error
    assert caught.value.__cause__ is error


async def test_a_block_that_swallows_the_failure_of_run_has_no_result_to_record(
    till: Till, layer: MemoryPersistenceLayer
) -> None:
    till.error = LookupError("declined")
    with pytest.raises(IdempotencyUsageError, match="swallowed its exception"):
        async with idempotency("key") as execution:
            with contextlib.suppress(LookupError):
                await execution.run(till.charge, ORDER)
    assert stored(layer) == []


async def test_a_block_may_set_another_result_after_a_failure_of_run(till: Till) -> None:
    till.error = LookupError("declined")
    async with idempotency("key") as execution:
        try:
            await execution.run(till.charge, ORDER)
        except LookupError:
            execution.result = "declined"
    async with idempotency("key") as execution:
        assert execution.result == "declined"


# --- Keys and payloads ------------------------------------------------------------------------------------------------


async def test_the_key_of_a_block_is_its_prefix_and_the_hash_of_any_value(till: Till) -> None:
    execution = await charge_step_by_step(till, key=Receipt(number=3), key_prefix="orders")
    digest = hashlib.sha256(b'{"number": 3}').hexdigest()
    assert execution.key == f"orders#{digest}"
    assert (await charge_step_by_step(till, key={"number": 3}, key_prefix="orders")).replayed
    assert (await charge_step_by_step(till, key={"number": 3})).key == f"aidem#{digest}"


async def test_the_key_expression_is_not_applied_to_the_key_of_a_block(till: Till) -> None:
    config = IdempotencyConfig(event_key_jmespath="id")
    one = await charge_step_by_step(till, key={"id": 1, "n": 1}, config=config)
    two = await charge_step_by_step(till, key={"id": 1, "n": 2}, config=config)
    assert one.key != two.key


async def test_another_payload_under_the_key_is_refused_and_the_block_does_not_run(till: Till) -> None:
    await charge_step_by_step(till, payload=ORDER)
    assert (await charge_step_by_step(till, payload=dict(ORDER))).replayed
    with pytest.raises(IdempotencyValidationError):
        await charge_step_by_step(till, payload=ORDER | {"amount": 11})
    assert len(till.charges) == 1


async def test_none_is_a_payload_too(till: Till) -> None:
    await charge_step_by_step(till, payload=None)
    with pytest.raises(IdempotencyValidationError):
        await charge_step_by_step(till, payload=0)
    assert (await charge_step_by_step(till)).replayed  # without a payload nothing is compared


async def test_of_the_payload_only_what_the_validation_expression_selects_must_stay(till: Till) -> None:
    config = IdempotencyConfig(payload_validation_jmespath="amount")
    await charge_step_by_step(till, payload=ORDER, config=config)
    assert (await charge_step_by_step(till, payload=ORDER | {"at": "noon"}, config=config)).replayed
    with pytest.raises(IdempotencyValidationError):
        await charge_step_by_step(till, payload=ORDER | {"amount": 11}, config=config)


@pytest.mark.parametrize("key", [None, "", [], {}, (), [None], {"id": None}])
async def test_without_a_key_the_block_runs_without_idempotency_and_warns(key: Any, till: Till, layer: Any) -> None:
    for runs in (1, 2):
        with pytest.warns(IdempotencyWarning, match="no idempotency key.*the block 'aidem'"):
            execution = await charge_step_by_step(till, key=key)
        assert execution.result == {"receipt": runs}
        assert (execution.key, execution.record, execution.fence, execution.replayed) == ("", None, 0, False)
    assert stored(layer) == []


async def test_run_without_a_key_calls_the_function_and_keeps_its_very_result() -> None:
    thing = object()

    async def charge() -> object:
        await current_execution().ensure_owned()
        return thing

    with pytest.warns(IdempotencyWarning, match="no idempotency key"):
        async with idempotency("") as execution:
            assert await execution.run(charge) is thing
    assert execution.result is thing


async def test_without_a_key_a_block_that_demands_one_does_not_run(till: Till) -> None:
    config = IdempotencyConfig(raise_on_no_idempotency_key=True)
    with pytest.raises(IdempotencyKeyError, match="the block 'aidem'"):
        await charge_step_by_step(till, key=None, config=config)
    assert till.charges == []


@pytest.mark.parametrize("options", [{"key": {"id": object()}}, {"key": 1, "payload": {"id": object()}}])
async def test_a_key_or_payload_that_cannot_be_hashed_is_refused_with_its_path(
    options: Any, till: Till, layer: Any
) -> None:
    with pytest.raises(IdempotencyKeyError, match=r"\$\.id is of type object"):
        await charge_step_by_step(till, **options)
    assert till.charges == []
    assert stored(layer) == []


@pytest.mark.parametrize("falsy", [0, False])
async def test_zero_and_false_are_keys(falsy: Any, till: Till) -> None:
    assert [(await charge_step_by_step(till, key=falsy)).replayed for _ in range(2)] == [False, True]


@pytest.mark.parametrize(
    ("option", "value", "allowed"),
    [
        ("persistence_store", "redis://:secret@host", "persistence layer"),
        ("config", object(), "IdempotencyConfig"),
        ("output_serializer", 3, "to_dict"),
        ("key_prefix", 3, "string"),
    ],
)
def test_a_wrong_option_is_refused_at_once_with_what_is_allowed(option: str, value: Any, allowed: str) -> None:
    options: Any = {option: value}
    with pytest.raises(IdempotencyConfigError, match=f"{option}=.*{allowed}") as caught:
        idempotency("key", **options)
    assert "secret" not in str(caught.value)


async def test_a_layer_that_looks_empty_is_used(till: Till) -> None:
    class Countable(MemoryPersistenceLayer):
        def __len__(self) -> int:
            return len(self.records())

    mine = Countable()
    await charge_step_by_step(till, persistence_store=mine)
    assert len(mine) == 1


# --- The response hook ------------------------------------------------------------------------------------------------


async def test_the_response_hook_sees_a_replay_once(till: Till) -> None:
    seen: list[Any] = []

    def hook(response: Any, record: DataRecord) -> Any:
        seen.append(record.response_data)
        return response | {"replayed": True}

    config = IdempotencyConfig(response_hook=hook)
    assert (await charge_step_by_step(till, config=config)).result == {"receipt": 1}
    assert seen == []
    async with idempotency("order-7", config=config) as execution:
        assert execution.result == execution.result == {"receipt": 1, "replayed": True}
    assert seen == ['{"receipt": 1}']
    async with idempotency("order-7", config=config) as execution:
        assert await execution.run(till.charge, ORDER) == execution.result == {"receipt": 1, "replayed": True}
    assert len(seen) == 2


async def test_an_async_response_hook_is_awaited_by_run_and_result_says_so(till: Till) -> None:
    async def hook(response: Any, record: DataRecord) -> Any:
        await asyncio.sleep(0)
        return [response]

    config = IdempotencyConfig(response_hook=hook)
    await charge_step_by_step(till, config=config)
    async with idempotency("order-7", config=config) as execution:
        with pytest.raises(IdempotencyUsageError, match=r"await execution\.run"):
            _ = execution.result
        charge: Any = till.charge
        assert await execution.run(charge, ORDER) == [{"receipt": 1}]
        assert execution.result == [{"receipt": 1}]


async def test_a_response_hook_that_answers_another_awaitable_is_awaited_too(till: Till) -> None:
    def hook(response: Any, record: DataRecord) -> Any:
        future = asyncio.get_running_loop().create_future()
        future.set_result("hooked")
        return future

    config = IdempotencyConfig(response_hook=hook)
    await charge_step_by_step(till, config=config)
    async with idempotency("order-7", config=config) as execution:
        with pytest.raises(IdempotencyUsageError, match="response_hook is async"):
            _ = execution.result
        charge: Any = till.charge
        assert await execution.run(charge, ORDER) == "hooked"


# --- Execution --------------------------------------------------------------------------------------------------------


async def test_key_for_is_the_hash_of_key_and_name_on_every_attempt(till: Till) -> None:
    keys: list[str] = []
    errors: list[Exception | None] = [LookupError(), None]

    async def attempt() -> str:
        async with idempotency("order-7") as execution:
            keys.append(execution.key_for("charge"))
            if not execution.replayed and (error := errors.pop(0)) is not None:
                raise error
        return execution.key

    with pytest.raises(LookupError):
        await attempt()
    key = await attempt()
    await attempt()
    assert keys == [hashlib.sha256(f"{key}#charge".encode()).hexdigest()] * 3


async def test_key_for_differs_by_name_and_by_key(till: Till) -> None:
    one, two = await charge_step_by_step(till, key=1), await charge_step_by_step(till, key=2)
    assert len({one.key_for("a"), one.key_for("b"), two.key_for("a")}) == 3


async def test_key_for_needs_a_key(till: Till) -> None:
    with pytest.warns(IdempotencyWarning, match="no idempotency key"):
        async with idempotency(None) as execution:
            assert not execution.replayed
            with pytest.raises(IdempotencyKeyError, match="key_for"):
                execution.key_for("charge")


async def test_the_fence_grows_with_every_new_claim(till: Till, clock: FakeClock) -> None:
    config = IdempotencyConfig(expires_after_seconds=5)
    fences = []
    for _ in range(3):
        fences.append((await charge_step_by_step(till, config=config)).fence)
        clock.advance(6)
    assert sorted(set(fences)) == fences
    assert (await charge_step_by_step(till)).fence > fences[-1]


async def test_the_record_of_the_execution_is_the_claim_then_the_outcome(till: Till) -> None:
    async with idempotency("key") as execution:
        assert not execution.replayed
        assert execution.record is not None
        claim = execution.record
    assert (claim.status, execution.record.status) == ("INPROGRESS", "COMPLETED")
    assert claim.owner == execution.record.owner


async def test_ensure_owned_renews_at_the_store_and_notices_a_loss(layer: MemoryPersistenceLayer, clock: Any) -> None:
    async with idempotency("key") as execution:
        assert not execution.replayed
        clock.advance(10)
        await execution.ensure_owned()
        (record,) = stored(layer)
        assert execution.record == record
        assert record.in_progress_expiry_timestamp == int((clock() + 30) * 1000)
        put(layer, record.replace(owner="another"))
        with pytest.raises(IdempotencyLeaseLostError):
            await execution.ensure_owned()
        put(layer, record)


async def test_ensure_owned_is_for_the_body_of_a_running_call(till: Till) -> None:
    execution = await charge_step_by_step(till)
    with pytest.raises(IdempotencyUsageError, match="ensure_owned"):
        await execution.ensure_owned()
    async with idempotency("order-7") as execution:
        assert execution.replayed
        with pytest.raises(IdempotencyUsageError, match="ensure_owned"):
            await execution.ensure_owned()


async def test_the_execution_of_a_block_is_the_current_one_also_in_what_it_calls() -> None:
    seen: list[Execution] = []

    async def charge() -> None:
        seen.append(current_execution())

    async with idempotency("key") as execution:
        await execution.run(charge)
        assert current_execution() is execution
    assert seen == [execution]
    with pytest.raises(IdempotencyUsageError):
        current_execution()
    with pytest.raises(LookupError):
        async with idempotency("other"):
            raise LookupError
    with pytest.raises(IdempotencyUsageError):
        current_execution()


async def test_blocks_of_several_tasks_have_their_own_executions() -> None:
    async def one(key: int) -> bool:
        async with idempotency(key) as execution:
            assert not execution.replayed
            await asyncio.sleep(0)
            return current_execution() is execution

    assert await asyncio.gather(*map(one, range(5))) == [True] * 5


async def test_a_block_in_an_async_generator_that_is_dropped_gives_its_key_back(layer: Any) -> None:
    async def steps() -> Any:
        async with idempotency("key") as execution:
            yield execution.replayed

    generator = steps()
    await anext(generator)
    assert len(stored(layer)) == 1
    await generator.aclose()
    await asyncio.sleep(0)
    assert stored(layer) == []


async def test_a_decorated_function_inside_a_block_has_its_own_key(till: Till) -> None:
    charge = idempotent_function(key_prefix="charge")(till.charge)
    for key in ("a", "b"):
        async with idempotency(key) as execution:
            assert await execution.run(charge, ORDER) == {"receipt": 1}
    assert len(till.charges) == 1


async def test_run_of_a_bound_method_and_of_a_callable_object() -> None:
    shop = SimpleNamespace(charge=Till().charge)
    async with idempotency("key") as execution:
        assert await execution.run(shop.charge, ORDER) == {"receipt": 1}
