"""A check instead of a human: who is in doubt is asked for, run, recorded or left in doubt as it was found."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

import pytest

from aidem import (
    DidNotHappen,
    Happened,
    IdempotencyConfig,
    RecordStatus,
    StillUnknown,
    current_execution,
    idempotency,
)
from aidem._engine.claim import _forked
from aidem.exceptions import (
    IdempotencyAlreadyInProgressError,
    IdempotencyConfigError,
    IdempotencyInDoubtError,
    IdempotencyLeaseLostError,
    IdempotencyPersistenceConnectionError,
    IdempotencyPersistenceLayerError,
    IdempotencyResultUnavailableError,
    IdempotencyUsageError,
    IdempotencyValidationError,
)
from aidem.hooks import EventKind
from aidem.persistence.memory import MemoryPersistenceLayer
from tests.support.planned import (
    VIRTUAL_TIME,
    Bank,
    Fault,
    Listener,
    PlannedLayer,
    Till,
    closed_when,
    is_same_doubt,
    made_idempotent,
    only_record,
    other_process,
)

ORDER = {"id": 7}
DOWN = IdempotencyPersistenceConnectionError("down")


@pytest.fixture
def anyio_backend() -> Any:
    return VIRTUAL_TIME


def charge_with(bank: Bank, layer: PlannedLayer, till: Till, **options: Any) -> Callable[[Any], Awaitable[Any]]:
    charge: Callable[[Any], Awaitable[Any]] = made_idempotent(
        till.charge, layer, **{"on_abandoned": bank.was_charged, **options}
    )
    return charge


async def left_in_doubt(layer: PlannedLayer, **options: Any) -> Any:
    """Let the owner of a claim vanish, until its lease has passed; return that claim."""

    async def hang(order: Any) -> None:
        await asyncio.sleep(100_000)

    options = {"on_abandoned": "raise", "renew_lease": False, **options}
    owner = asyncio.ensure_future(made_idempotent(hang, PlannedLayer(inner=layer.inner), **options)(ORDER))
    await asyncio.sleep(31)
    found = only_record(layer)
    owner.add_done_callback(lambda _: None)
    layer.calls.clear()
    layer.owner = owner  # type: ignore[attr-defined] # or it would be collected
    return found


# --- Verdicts ---------------------------------------------------------------------------------------------------------


async def test_what_happened_is_recorded_and_replayed_to_the_asker_and_to_later_callers() -> None:
    layer, till, listener = PlannedLayer(), Till(), Listener()
    found = await left_in_doubt(layer)
    bank = Bank(Happened({"receipt": 9}))
    charge = charge_with(bank, layer, till, response_hook=lambda value, _: {**value, "hooked": 1}, hooks=(listener,))
    assert await charge(ORDER) == {"receipt": 9, "hooked": 1}
    assert await charge(ORDER) == {"receipt": 9, "hooked": 1}
    assert not till.charges
    assert listener.kinds == [
        EventKind.TAKEN_OVER,
        EventKind.CHECKED,
        EventKind.REPLAYED,
        EventKind.REPLAYED,
    ]
    [abandoned] = bank.asked
    assert (abandoned.key, abandoned.payload, abandoned.record) == (found.idempotency_key, ORDER, found)
    assert abandoned.fence == only_record(layer).fence > found.fence


async def test_what_did_not_happen_runs_under_a_claim_that_the_store_has_confirmed() -> None:
    layer, keys = PlannedLayer(), []
    await left_in_doubt(layer)
    bank = Bank(DidNotHappen())

    async def charge(order: Any) -> list[str]:
        keys.append((current_execution().key_for("charge"), current_execution().fence))
        return list(layer.calls)

    calls = await made_idempotent(charge, layer, on_abandoned=bank.was_charged)(ORDER)
    assert calls == ["acquire", "take_over", "renew"]
    assert keys == [(bank.asked[0].key_for("charge"), bank.asked[0].fence)]
    assert only_record(layer).status is RecordStatus.COMPLETED


async def test_what_is_still_unknown_is_in_doubt_as_it_was_found_and_nobodys() -> None:
    layer, till = PlannedLayer(), Till()
    found = await left_in_doubt(layer, note=lambda _: "order 7")
    bank = Bank(StillUnknown(), StillUnknown(), seconds=50)
    charge = charge_with(bank, layer, till, lease_seconds=5)
    owners = {found.owner}
    for _ in range(2):
        with pytest.raises(IdempotencyInDoubtError, match="aidem release KEY") as caught:
            await charge(ORDER)
        assert caught.value.record == only_record(layer)
        assert is_same_doubt(caught.value.record, found)
        owners.add(caught.value.record.owner)
    assert len(owners) == 3
    assert bank.asked[1].record.note == "order 7"
    assert await layer.release(caught.value.record)
    assert not till.charges


@pytest.mark.parametrize("answer", [None, True, Happened, {"receipt": 1}, ValueError("the bank is closed")])
async def test_a_check_that_fails_or_answers_no_verdict_leaves_the_key_in_doubt(answer: Any) -> None:
    layer, till = PlannedLayer(), Till()
    found = await left_in_doubt(layer)
    with pytest.raises(IdempotencyInDoubtError) as caught:
        await charge_with(Bank(answer), layer, till)(ORDER)
    cause = caught.value.__cause__
    assert cause is answer or isinstance(cause, IdempotencyUsageError)
    assert is_same_doubt(only_record(layer), found)
    assert not till.charges


async def test_a_result_of_the_check_that_cannot_be_stored_is_unavailable() -> None:
    layer, till = PlannedLayer(), Till()
    await left_in_doubt(layer)
    charge = charge_with(Bank(Happened(object())), layer, till)
    for _ in range(2):
        with pytest.raises(IdempotencyResultUnavailableError):
            await charge(ORDER)
    assert not till.charges


async def test_a_plain_check_may_answer_at_once() -> None:
    layer, till = PlannedLayer(), Till()
    await left_in_doubt(layer)
    charge = made_idempotent(till.charge, layer, on_abandoned=lambda _: Happened({"receipt": 9}))
    assert await charge(ORDER) == {"receipt": 9}


async def test_a_block_asks_with_its_payload_else_with_its_key() -> None:
    for payload, told in ((..., "o-1"), ({"amount": 5}, {"amount": 5})):
        layer, bank = PlannedLayer(), Bank(Happened(9))
        options: dict[str, Any] = {"payload": payload, "persistence_store": layer}
        with pytest.raises(SystemExit):
            await leave_block(idempotency("o-1", config=IdempotencyConfig(on_abandoned="raise"), **options))
        config = IdempotencyConfig(on_abandoned=bank.was_charged)
        async with idempotency("o-1", config=config, **options) as execution:
            assert execution.replayed
        assert execution.result == 9
        assert bank.asked[0].payload == told


async def leave_block(block: Any) -> None:
    async with block:
        raise SystemExit


# --- Who is asked -----------------------------------------------------------------------------------------------------


async def test_a_running_claim_is_not_asked_about() -> None:
    layer, till = PlannedLayer(), Till()
    till.seconds = 100
    bank = Bank()
    owner = asyncio.ensure_future(charge_with(bank, layer, till)(ORDER))
    await asyncio.sleep(50)
    with pytest.raises(IdempotencyAlreadyInProgressError):
        await charge_with(bank, other_process(layer), till)(ORDER)
    assert await owner == {"receipt": 1}
    assert not bank.asked


async def test_a_lapsed_claim_of_run_again_runs_and_is_not_asked_about() -> None:
    layer, till, bank = PlannedLayer(), Till(), Bank()
    await left_in_doubt(layer, on_abandoned="run_again")
    assert await charge_with(bank, layer, till)(ORDER) == {"receipt": 1}
    assert not bank.asked


@pytest.mark.parametrize("finder", ["run_again", "raise"])
async def test_a_lapsed_claim_under_a_check_is_in_doubt_for_who_has_none(finder: Any) -> None:
    layer, till = PlannedLayer(), Till()
    found = await left_in_doubt(layer, on_abandoned=Bank().was_charged)
    assert found.in_progress_expiry_timestamp is None
    with pytest.raises(IdempotencyInDoubtError):
        await charge_with(Bank(), layer, till, on_abandoned=finder)(ORDER)
    assert not till.charges


async def test_another_payload_is_refused_and_validation_hash_and_note_are_kept() -> None:
    layer, till = PlannedLayer(), Till()
    options: dict[str, Any] = {"event_key_jmespath": "id", "payload_validation_jmespath": "amount"}
    found = await left_in_doubt(
        layer, payload_validation_jmespath="id", event_key_jmespath="id", note=lambda _: "order 7"
    )
    assert found.payload_hash
    bank = Bank(DidNotHappen())
    with pytest.raises(IdempotencyValidationError):
        await charge_with(bank, layer, till, **options)({**ORDER, "amount": 5})
    assert not bank.asked
    assert await charge_with(bank, layer, till, event_key_jmespath="id")(ORDER) == {"receipt": 1}
    assert only_record(layer).payload_hash == found.payload_hash
    assert only_record(layer).note == "order 7"


# --- While the check is asked -----------------------------------------------------------------------------------------


async def test_the_claim_is_renewed_while_the_check_is_asked_and_others_wait_for_it() -> None:
    layer, till = PlannedLayer(), Till()
    await left_in_doubt(layer)
    bank = Bank(DidNotHappen(), seconds=200)
    asking = asyncio.ensure_future(charge_with(bank, layer, till)(ORDER))
    await asyncio.sleep(150)
    with pytest.raises(IdempotencyAlreadyInProgressError):
        await charge_with(bank, other_process(layer), till)(ORDER)
    assert await asking == {"receipt": 1}
    assert layer.calls.count("renew") > 15
    assert len(bank.asked) == 1


async def test_the_time_for_waiting_does_not_bound_the_check_but_a_timeout_does() -> None:
    layer, till = PlannedLayer(), Till()
    found = await left_in_doubt(layer)
    bank = Bank(DidNotHappen(), Happened({"receipt": 9}), seconds=100)
    charge = charge_with(bank, layer, till, wait_timeout_seconds=1)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(charge(ORDER), 50)
    assert is_same_doubt(only_record(layer), found)
    bank.answers.pop(0)
    assert await charge(ORDER) == {"receipt": 9}


@pytest.mark.parametrize("verdict", [Happened({"receipt": 9}), StillUnknown(), ValueError("the bank is closed")])
async def test_callers_of_one_loop_share_the_verdict(verdict: Any) -> None:
    layer, till = PlannedLayer(), Till()
    await left_in_doubt(layer)
    bank = Bank(verdict, seconds=20)
    charge = charge_with(bank, layer, till, wait_timeout_seconds=60)
    answers: list[Any] = await asyncio.gather(*(charge(ORDER) for _ in range(5)), return_exceptions=True)
    assert len(bank.asked) == 1
    if isinstance(verdict, Happened):
        assert answers == [{"receipt": 9}] * 5
    else:
        assert all(isinstance(answer, IdempotencyInDoubtError) for answer in answers)
        assert {answer.record for answer in answers} == {only_record(layer)}
        assert len(set(map(id, answers))) == 5
        assert {answer.__cause__ for answer in answers} == {verdict if isinstance(verdict, ValueError) else None}


@pytest.mark.parametrize("finder", ["run_again", "raise"])
async def test_callers_of_one_loop_without_a_check_are_told_of_the_doubt_at_once(finder: Any) -> None:
    layer, till = PlannedLayer(latency_seconds=0.1), Till()
    found = await left_in_doubt(layer)
    charge = charge_with(Bank(), layer, till, on_abandoned=finder, wait_timeout_seconds=1)
    began = asyncio.get_running_loop().time()
    answers: list[Any] = await asyncio.gather(*(charge(ORDER) for _ in range(30)), return_exceptions=True)
    assert asyncio.get_running_loop().time() - began == pytest.approx(0.1)
    assert Counter((type(answer), answer.record) for answer in answers) == {(IdempotencyInDoubtError, found): 30}
    assert layer.calls == ["acquire"]


async def test_callers_with_a_check_behind_one_without_ask_theirs() -> None:
    layer, till, bank = PlannedLayer(latency_seconds=0.1), Till(), Bank(Happened({"receipt": 9}))
    await left_in_doubt(layer)
    options: dict[str, Any] = {"wait_timeout_seconds": 60}
    first = asyncio.ensure_future(charge_with(bank, layer, till, on_abandoned="raise", **options)(ORDER))
    behind = [asyncio.ensure_future(charge_with(bank, layer, till, **options)(ORDER)) for _ in range(3)]
    with pytest.raises(IdempotencyInDoubtError):
        await first
    assert await asyncio.gather(*behind) == [{"receipt": 9}] * 3
    assert len(bank.asked) == 1


async def test_of_two_askers_one_checks_and_the_other_gets_its_outcome() -> None:
    layer, till = PlannedLayer(), Till()
    await left_in_doubt(layer)
    bank = Bank(Happened({"receipt": 9}), seconds=5)
    askers = [charge_with(bank, each, till, wait_timeout_seconds=60) for each in (layer, other_process(layer))]
    layer.latency_seconds = 0.01
    assert await asyncio.gather(*(ask(ORDER) for ask in askers)) == [{"receipt": 9}] * 2
    assert len(bank.asked) == 1


async def test_callers_who_wait_share_the_verdict_also_where_another_process_was_quicker() -> None:
    layer, till = PlannedLayer(), Till()
    await left_in_doubt(layer)
    bank = Bank(StillUnknown(), StillUnknown(), seconds=0.001)  # over before a refused caller asks again
    layers = (layer, other_process(layer))
    for each in layers:
        each.latency_seconds = 0.01
    charges = [charge_with(bank, each, till, wait_timeout_seconds=60) for each in layers]
    callers = [charge(ORDER) for charge in charges for _ in range(5)]
    answers: list[Any] = await asyncio.gather(*callers, return_exceptions=True)
    assert [type(answer) for answer in answers] == [IdempotencyInDoubtError] * 10
    assert sum(each.calls.count("take_over") for each in layers) == 3, "nobody was refused"
    assert len(bank.asked) == 2


@pytest.mark.parametrize("per_process", [1, 20])
async def test_callers_who_do_not_wait_are_told_at_once_that_another_one_checks(per_process: int) -> None:
    layer, till = PlannedLayer(), Till()
    found = await left_in_doubt(layer)
    bank = Bank(StillUnknown(), seconds=1)
    answers, calls = await asked_by_twenty(bank, layer, till, per_process=per_process)
    assert Counter((type(answer), answer.record.fence - found.fence) for answer in answers) == {
        (IdempotencyAlreadyInProgressError, 1): 19,
        (IdempotencyInDoubtError, 2): 1,
    }
    assert calls == {"acquire": 39, "take_over": 20, "put back": 1}


@pytest.mark.parametrize("per_process", [1, 20])
async def test_callers_who_do_not_wait_are_not_led_on_by_checks_that_are_over_when_they_ask_again(
    per_process: int,
) -> None:
    layer, till = PlannedLayer(), Till()
    await left_in_doubt(layer)
    bank = Bank(*[StillUnknown()] * 2, seconds=0.001)
    again = [Fault(before_seconds=0.02)] * per_process
    began = asyncio.get_running_loop().time()
    answers, calls = await asked_by_twenty(bank, layer, till, per_process=per_process, again=again)
    assert asyncio.get_running_loop().time() - began < 0.1
    assert Counter(map(type, answers)) == {IdempotencyAlreadyInProgressError: 18, IdempotencyInDoubtError: 2}
    assert calls == {"acquire": 39, "take_over": 39, "put back": 2}


async def asked_by_twenty(
    bank: Bank, layer: PlannedLayer, till: Till, *, per_process: int, again: Iterable[Fault] = ()
) -> tuple[list[Any], dict[str, int]]:
    """Let callers that do not wait come at once; return what they got, and how often their layers were called.

    `again` is what happens when a process asks for the key again.
    """
    layers = [layer, *(other_process(layer) for _ in range(20 // per_process - 1))]
    for each in layers:
        each.latency_seconds = 0.01
        each.plan("acquire", *[Fault()] * per_process, *again)
    charges = [charge_with(bank, each, till) for each in layers]
    callers = [charge(ORDER) for charge in charges for _ in range(per_process)]
    answers = await asyncio.gather(*callers, return_exceptions=True)
    return answers, Counter(call for each in layers for call in each.calls)


async def test_who_finds_the_owner_come_back_just_before_the_check_gets_its_outcome_without_waiting() -> None:
    layer, till = PlannedLayer(), Till()
    till.seconds = 60
    owner = asyncio.ensure_future(charge_with(Bank(), other_process(layer), till, renew_lease=False)(ORDER))
    await asyncio.sleep(59)
    layer.plan("take_over", Fault(before_seconds=2))
    assert await charge_with(Bank(), layer, till)(ORDER) == {"receipt": 1}
    assert layer.calls == ["acquire", "take_over", "acquire"]
    assert await owner == {"receipt": 1}


async def test_a_caller_that_is_never_quick_enough_to_check_gives_up_at_its_timeout() -> None:
    layer, till = PlannedLayer(), Till()
    await left_in_doubt(layer)

    async def refuse(*_: Any, **__: Any) -> None:
        layer.calls.append("take_over")

    layer.take_over = refuse  # type: ignore[method-assign]
    began = asyncio.get_running_loop().time()
    with pytest.raises(IdempotencyAlreadyInProgressError) as caught:
        async with asyncio.timeout(100):
            await charge_with(Bank(), layer, till, wait_timeout_seconds=5)(ORDER)
    assert asyncio.get_running_loop().time() - began == pytest.approx(5)
    assert caught.value.retry_after_seconds == 1
    assert 10 < layer.calls.count("take_over") <= 22


async def test_an_asker_that_stood_still_does_not_run_what_another_has_checked_meanwhile() -> None:
    layer, till = PlannedLayer(), Till()
    await left_in_doubt(layer)
    slow, quick = Bank(DidNotHappen(), seconds=60), Bank(DidNotHappen())
    late = asyncio.ensure_future(charge_with(slow, layer, till, renew_lease=False, wait_timeout_seconds=9)(ORDER))
    await asyncio.sleep(40)
    assert await charge_with(quick, other_process(layer), till)(ORDER) == {"receipt": 1}
    assert quick.asked[0].record.fence == slow.asked[0].fence
    assert await late == {"receipt": 1}
    assert len(till.charges) == 1


async def test_an_asker_that_was_overtaken_does_not_record_what_it_found() -> None:
    for verdict in (Happened({"receipt": 8}), StillUnknown()):
        layer, till = PlannedLayer(), Till()
        await left_in_doubt(layer)
        late = asyncio.ensure_future(charge_with(Bank(verdict, seconds=60), layer, till, renew_lease=False)(ORDER))
        await asyncio.sleep(40)
        quick = Bank(Happened({"receipt": 9}))
        assert await charge_with(quick, other_process(layer), till)(ORDER) == {"receipt": 9}
        assert await late == {"receipt": 9}
        assert await charge_with(Bank(), layer, till, wait_timeout_seconds=9)(ORDER) == {
            "receipt": 9
        }  # no line is left


@pytest.mark.parametrize("verdict", [Happened({"receipt": 8}), DidNotHappen(), StillUnknown()])
async def test_an_asker_that_finds_its_claim_gone_says_so_once_and_joins_the_line_that_the_next_one_leads(
    verdict: Any,
) -> None:
    layer, till, listener = PlannedLayer(), Till(), Listener()
    found = await left_in_doubt(layer)
    bank = Bank(verdict, seconds=5)  # over before the first renewal
    options: dict[str, Any] = {"wait_timeout_seconds": 60}
    asking = asyncio.ensure_future(charge_with(bank, layer, till, hooks=(listener,), **options)(ORDER))
    await asyncio.sleep(1)
    waiting = [asyncio.ensure_future(charge_with(bank, layer, till, **options)(ORDER)) for _ in range(3)]
    await layer.inner.forget(found.idempotency_key)
    assert await charge_with(bank, other_process(layer), till)(ORDER) == {"receipt": 1}
    async with asyncio.timeout(5):
        assert await asyncio.gather(asking, *waiting) == [{"receipt": 1}] * 4
    assert len(bank.asked) == len(till.charges) == 1
    assert listener.kinds == [
        EventKind.TAKEN_OVER,
        EventKind.CHECKED,
        EventKind.LEASE_LOST,
        EventKind.REPLAYED,
        EventKind.WAITED,
    ]


async def test_an_asker_that_vanishes_leaves_the_key_in_doubt_when_its_lease_passes() -> None:
    layer, till = PlannedLayer(), Till()
    found = await left_in_doubt(layer)
    asking = asyncio.ensure_future(charge_with(Bank(seconds=1000), layer, till, renew_lease=False)(ORDER))
    await asyncio.sleep(31)
    bank = Bank(Happened({"receipt": 9}))
    assert await charge_with(bank, other_process(layer), till)(ORDER) == {"receipt": 9}
    assert bank.asked[0].record.owner != found.owner
    asking.cancel()
    await asyncio.wait([asking])
    assert only_record(layer).status is RecordStatus.COMPLETED


async def test_the_late_owner_finds_its_claim_lost() -> None:
    layer, till, listener = PlannedLayer(), Till(), Listener()
    till.seconds = 60
    options: dict[str, Any] = {"renew_lease": False, "hooks": (listener,)}
    owner = asyncio.ensure_future(charge_with(Bank(), other_process(layer), till, **options)(ORDER))
    await asyncio.sleep(40)
    assert await charge_with(Bank(Happened({"receipt": 9})), layer, till)(ORDER) == {"receipt": 9}
    assert await owner == {"receipt": 9}
    assert EventKind.LEASE_LOST in listener.kinds


# --- Broken off -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verdict", [Happened({"receipt": 9}), DidNotHappen(), StillUnknown()])
@pytest.mark.parametrize("where", ["acquire", "take_over", "check", "renew", "complete", "put back"])
async def test_a_cancelled_asker_leaves_the_doubt_as_it_was_or_an_outcome_within_the_bound(
    where: str, verdict: Any
) -> None:
    layer, till, bank = PlannedLayer(latency_seconds=1.0), Till(), Bank(verdict, seconds=1.0)
    found = await left_in_doubt(layer)
    asking = asyncio.ensure_future(charge_with(bank, layer, till)(ORDER))
    loop = asyncio.get_running_loop()
    while not (layer.calls[-1:] == [where] or (where == "check" and bank.asked) or asking.done()):
        await asyncio.wait([asking], timeout=0.1)
    if asking.done():
        await asyncio.wait([asking])
        return  # it never comes there with this verdict
    await asyncio.sleep(0.5)
    cancelled_at = loop.time()
    asking.cancel()
    await asyncio.wait([asking])
    assert loop.time() - cancelled_at <= 5
    assert asking.cancelled()
    record = only_record(layer)
    if record.status is RecordStatus.INPROGRESS:
        assert is_same_doubt(record, found, within_seconds=1)
    else:
        assert where == "complete"
        assert isinstance(verdict, Happened) or till.charges
    assert not till.charges or where == "complete"


async def test_an_asker_whose_clean_up_hangs_ends_within_the_bound() -> None:
    for operation in ("take_over", "put back"):
        layer, till = PlannedLayer(), Till()
        await left_in_doubt(layer)
        layer.plan(operation, Fault(before_seconds=100))
        loop = asyncio.get_running_loop()
        asking = asyncio.ensure_future(charge_with(Bank(seconds=100), layer, till)(ORDER))
        await asyncio.sleep(1)
        cancelled_at = loop.time()
        asking.cancel()
        await asyncio.wait([asking])
        assert asking.cancelled()
        assert 4.5 < loop.time() - cancelled_at <= 5.1


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
async def test_an_interrupt_of_the_check_is_raised_and_puts_the_claim_back(error: Any) -> None:
    layer, till = PlannedLayer(), Till()
    found = await left_in_doubt(layer)
    seen: list[BaseException] = []

    async def call() -> None:
        try:
            await charge_with(Bank(error()), layer, till)(ORDER)
        except BaseException as caught:  # noqa: BLE001 - SystemExit too
            seen.append(caught)

    await call()
    assert [type(caught) for caught in seen] == [error]
    assert is_same_doubt(only_record(layer), found)


@pytest.mark.parametrize("where", ["take_over", "check", "renew"])
async def test_a_closed_asker_puts_the_claim_back_in_the_background(where: str) -> None:
    layer, till, bank = PlannedLayer(latency_seconds=0.5), Till(), Bank(DidNotHappen(), seconds=1)
    found = await left_in_doubt(layer)
    coroutine: Any = charge_with(bank, layer, till, lease_seconds=20)(ORDER)
    await closed_when(coroutine, lambda: layer.calls[-1:] == [where] or (where == "check" and bank.asked))
    await asyncio.sleep(4)
    assert is_same_doubt(only_record(layer), found, within_seconds=1)
    assert only_record(layer).owner != found.owner


async def test_a_fork_neither_puts_the_claim_of_its_parent_back_nor_runs_under_it() -> None:
    for verdict, expected in (
        (StillUnknown(), IdempotencyAlreadyInProgressError),
        (DidNotHappen(), IdempotencyLeaseLostError),
    ):
        layer, till = PlannedLayer(), Till()
        claims: list[Any] = []
        await left_in_doubt(layer)

        def check(_: Any, verdict: Any = verdict, layer: Any = layer, claims: list[Any] = claims) -> Any:
            claims.append(only_record(layer))
            _forked()  # as the interpreter calls it in the child
            return verdict

        with pytest.raises(expected):
            await made_idempotent(till.charge, layer, on_abandoned=check)(ORDER)
        await asyncio.sleep(1)
        assert [only_record(layer)] == claims
        assert not till.charges


# --- The store fails --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_applied", [True, False])
async def test_a_take_over_whose_reply_is_lost_is_put_back(is_applied: bool) -> None:
    layer, till, bank = PlannedLayer(), Till(), Bank()
    found = await left_in_doubt(layer)
    layer.plan("take_over", Fault(error=DOWN, applied=is_applied))
    with pytest.raises(IdempotencyPersistenceConnectionError, match="was not run"):
        await charge_with(bank, layer, till)(ORDER)
    assert is_same_doubt(only_record(layer), found)
    assert (only_record(layer).owner == found.owner) == (not is_applied)
    assert not bank.asked


async def test_a_take_over_that_cannot_have_been_applied_is_not_put_back() -> None:
    layer, till = PlannedLayer(), Till()
    await left_in_doubt(layer)
    layer.plan("take_over", Fault(error=ConnectionRefusedError()))
    with pytest.raises(IdempotencyPersistenceConnectionError):
        await charge_with(Bank(), layer, till)(ORDER)
    assert layer.calls == ["acquire", "take_over"]


@pytest.mark.parametrize(("operation", "verdict"), [("renew", DidNotHappen()), ("complete", Happened({"receipt": 9}))])
async def test_a_verdict_that_the_store_does_not_take_leaves_the_doubt_as_it_was(operation: str, verdict: Any) -> None:
    layer, till = PlannedLayer(), Till()
    found = await left_in_doubt(layer)
    layer.plan(operation, *[Fault(error=DOWN)] * 100)
    with pytest.raises(IdempotencyPersistenceLayerError, match="was not run"):
        await charge_with(Bank(verdict), layer, till)(ORDER)
    assert is_same_doubt(only_record(layer), found)
    assert not till.charges


async def test_a_claim_that_cannot_be_put_back_is_in_doubt_when_its_lease_passes(caplog: Any) -> None:
    layer, till = PlannedLayer(), Till()
    await left_in_doubt(layer)
    layer.plan("put back", *[Fault(error=DOWN)] * 100)
    with pytest.raises(IdempotencyInDoubtError) as caught:
        await charge_with(Bank(StillUnknown()), layer, till)(ORDER)
    assert caught.value.record == only_record(layer)
    assert "only when its lease passes" in caplog.text
    await asyncio.sleep(31)
    assert await charge_with(Bank(Happened({"receipt": 9})), layer, till)(ORDER) == {"receipt": 9}


# --- Settings ---------------------------------------------------------------------------------------------------------


async def test_doubt_is_kept_for_its_own_time_and_an_outcome_for_its() -> None:
    layer, till = PlannedLayer(), Till()
    options: dict[str, Any] = {"expires_after_seconds": 100, "doubt_kept_seconds": 1000}
    found = await left_in_doubt(layer, **options)
    await asyncio.sleep(800)
    with pytest.raises(IdempotencyInDoubtError):
        await charge_with(Bank(StillUnknown()), layer, till, **options)(ORDER)
    assert only_record(layer).expiry_timestamp == found.expiry_timestamp
    await asyncio.sleep(200)
    assert await charge_with(Bank(), layer, till, **options)(ORDER) == {"receipt": 1}
    assert only_record(layer).expiry_timestamp - layer.clock() <= 100


def test_a_check_is_not_part_of_the_hash_of_a_config() -> None:
    class Unhashable:
        __hash__ = None  # type: ignore[assignment]

        def __call__(self, _: Any) -> Any: ...

    assert hash(IdempotencyConfig(on_abandoned=Unhashable())) == hash(IdempotencyConfig())


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"lease_seconds": None}, "lease_seconds=None"),
        ({"on_persistence_error": "run"}, "on_persistence_error='run'"),
        ({"on_abandoned": Happened}, "on_abandoned="),
        ({"doubt_kept_seconds": 0}, "doubt_kept_seconds=0"),
    ],
)
def test_settings_that_cannot_work_with_a_check_are_refused(options: Any, name: str) -> None:
    with pytest.raises(IdempotencyConfigError, match=name):
        IdempotencyConfig(**{"on_abandoned": Bank().was_charged, **options})


async def test_a_layer_that_cannot_take_over_is_refused_at_the_first_call() -> None:
    class Layer(MemoryPersistenceLayer):
        take_over = None  # type: ignore[assignment]

    charge = made_idempotent(Till().charge, Layer(), on_abandoned=Bank().was_charged)
    with pytest.raises(IdempotencyConfigError, match="take_over"):
        await charge(ORDER)
