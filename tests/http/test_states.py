"""The states of a response under a claim: what each event does, without any I/O."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aidem._http.states import TRANSITIONS, Action, Event, State

CLAIMED = {State.WAITING, State.HELD, State.SENDING}
ENDS_OF_A_RECORDING = {
    Event.RECORDED,
    Event.NOT_RECORDED,
    Event.CLAIM_LOST,
    Event.OTHER_RECORDED,
    Event.INTERRUPTED,
}

# What the app does and what becomes of it, from WAITING on.
WALKS: dict[str, list[tuple[Event, Action, State]]] = {
    "a response that declares its length is held, recorded and sent": [
        (Event.START_WITH_LENGTH, Action.HOLD, State.HELD),
        (Event.LAST_PART, Action.RECORD, State.HELD),
        (Event.RECORDED, Action.PASS, State.PASSING),
    ],
    "a response that declares its length and comes in parts is sent from the first part on": [
        (Event.START_WITH_LENGTH, Action.HOLD, State.HELD),
        (Event.PART, Action.PASS, State.SENDING),
        (Event.LAST_PART, Action.RECORD, State.SENDING),
        (Event.RECORDED, Action.PASS, State.PASSING),
    ],
    "a stream is sent part by part, and recorded before the last one": [
        (Event.START_STREAMED, Action.PASS, State.SENDING),
        (Event.PART, Action.PASS, State.SENDING),
        (Event.MESSAGE, Action.PASS, State.SENDING),
        (Event.LAST_PART, Action.RECORD, State.SENDING),
        (Event.RECORDED, Action.PASS, State.PASSING),
    ],
    "a response that is not to be stored gives the key back before its start is sent": [
        (Event.MESSAGE, Action.PASS, State.WAITING),
        (Event.START_NOT_STORED, Action.RELEASE, State.PASSING),
    ],
    "a second start replaces one that is held, as nothing was sent": [
        (Event.START_WITH_LENGTH, Action.HOLD, State.HELD),
        (Event.MESSAGE, Action.PASS, State.HELD),
        (Event.START_WITH_LENGTH, Action.HOLD, State.HELD),
        (Event.START_NOT_STORED, Action.RELEASE, State.PASSING),
    ],
    "a second start may be that of a stream": [
        (Event.START_WITH_LENGTH, Action.HOLD, State.HELD),
        (Event.START_STREAMED, Action.PASS, State.SENDING),
    ],
    "a stream that is too large is recorded as done and goes on": [
        (Event.START_STREAMED, Action.PASS, State.SENDING),
        (Event.OUTGROWN, Action.RECORD_AS_DONE, State.SENDING),
        (Event.RECORDED, Action.PASS, State.PASSING),
    ],
    "a response that declares too great a length is recorded as done before its start is sent": [
        (Event.START_WITH_LENGTH, Action.HOLD, State.HELD),
        (Event.OUTGROWN, Action.RECORD_AS_DONE, State.HELD),
        (Event.RECORDED, Action.PASS, State.PASSING),
    ],
    "an app that fails before the start gives the key back": [
        (Event.BROKEN_OFF, Action.RELEASE, State.PASSING),
    ],
    "an app that fails while its start is held gives the key back": [
        (Event.START_WITH_LENGTH, Action.HOLD, State.HELD),
        (Event.BROKEN_OFF, Action.RELEASE, State.PASSING),
    ],
    "an app that fails after the start was sent is recorded as done": [
        (Event.START_STREAMED, Action.PASS, State.SENDING),
        (Event.BROKEN_OFF, Action.RECORD_AS_DONE, State.SENDING),
        (Event.RECORDED, Action.PASS, State.PASSING),
    ],
    "a recording that fails while the start is held is answered with a problem": [
        (Event.START_WITH_LENGTH, Action.HOLD, State.HELD),
        (Event.LAST_PART, Action.RECORD, State.HELD),
        (Event.NOT_RECORDED, Action.SEND_NOT_RECORDED, State.REPLACED),
    ],
    "a recording that fails after the start was sent withholds the rest when the lease ends": [
        (Event.START_STREAMED, Action.PASS, State.SENDING),
        (Event.LAST_PART, Action.RECORD, State.SENDING),
        (Event.NOT_RECORDED, Action.PASS, State.UNRECORDED),
        (Event.LEASE_ENDING, Action.RAISE, State.WITHHELD),
    ],
    "a claim that is lost while the start is held is answered with a problem": [
        (Event.START_WITH_LENGTH, Action.HOLD, State.HELD),
        (Event.LAST_PART, Action.RECORD, State.HELD),
        (Event.CLAIM_LOST, Action.SEND_OUTCOME_UNKNOWN, State.REPLACED),
    ],
    "a response recorded by another call goes out in place of one whose start is held": [
        (Event.START_WITH_LENGTH, Action.HOLD, State.HELD),
        (Event.LAST_PART, Action.RECORD, State.HELD),
        (Event.OTHER_RECORDED, Action.SEND_REPLAY, State.REPLACED),
    ],
    "a claim that is lost after the start was sent withholds the rest": [
        (Event.START_STREAMED, Action.PASS, State.SENDING),
        (Event.LAST_PART, Action.RECORD, State.SENDING),
        (Event.CLAIM_LOST, Action.RAISE, State.WITHHELD),
    ],
    "a response recorded by another call withholds the rest of one whose start was sent": [
        (Event.START_STREAMED, Action.PASS, State.SENDING),
        (Event.LAST_PART, Action.RECORD, State.SENDING),
        (Event.OTHER_RECORDED, Action.RAISE, State.WITHHELD),
    ],
    "a recording that is interrupted while the start is held ends the call": [
        (Event.START_WITH_LENGTH, Action.HOLD, State.HELD),
        (Event.LAST_PART, Action.RECORD, State.HELD),
        (Event.INTERRUPTED, Action.PASS, State.PASSING),
    ],
    "a recording that is interrupted after the start was sent ends the call": [
        (Event.START_STREAMED, Action.PASS, State.SENDING),
        (Event.LAST_PART, Action.RECORD, State.SENDING),
        (Event.INTERRUPTED, Action.PASS, State.PASSING),
    ],
}


@pytest.mark.parametrize("walk", WALKS.values(), ids=WALKS)
def test_a_response_goes_through_its_states(walk: list[tuple[Event, Action, State]]) -> None:
    state = State.WAITING
    for event, action, then in walk:
        assert TRANSITIONS[state, event] == (action, then)
        state = then


def test_the_walks_take_every_transition_of_a_claimed_call() -> None:
    taken = set()
    for walk in WALKS.values():
        states = [State.WAITING, *(then for _, _, then in walk)]
        taken |= {(state, event) for state, (event, _, _) in zip(states, walk, strict=False)}
    by_claim = {(state, event) for state, event in TRANSITIONS if state in CLAIMED}
    assert by_claim == {(state, event) for state, event in taken if state in CLAIMED}


@pytest.mark.parametrize(
    ("state", "action"),
    [
        (State.PASSING, Action.PASS),
        (State.UNRECORDED, Action.PASS),
        (State.REPLACED, Action.DROP),
        (State.WITHHELD, Action.RAISE),
    ],
)
def test_a_call_that_has_ended_stays_as_it_is(state: State, action: Action) -> None:
    for event in set(Event) - {Event.LEASE_ENDING}:
        assert TRANSITIONS[state, event] == (action, state)


def test_every_event_that_can_happen_has_a_step() -> None:
    of_the_app = set(Event) - ENDS_OF_A_RECORDING - {Event.LEASE_ENDING}
    parts = {Event.PART, Event.LAST_PART, Event.OUTGROWN}  # before a start they are messages like any other
    starts = {Event.START_NOT_STORED, Event.START_WITH_LENGTH, Event.START_STREAMED}  # so is a start after a start
    expected = {
        State.WAITING: of_the_app - parts,
        State.HELD: of_the_app | ENDS_OF_A_RECORDING,
        State.SENDING: of_the_app - starts | ENDS_OF_A_RECORDING,
        State.PASSING: of_the_app | ENDS_OF_A_RECORDING,
        State.UNRECORDED: set(Event),
        State.REPLACED: of_the_app | ENDS_OF_A_RECORDING,
        State.WITHHELD: of_the_app | ENDS_OF_A_RECORDING,
    }
    assert {state: {event for of, event in TRANSITIONS if of is state} for state in State} == expected


@st.composite
def histories(draw: st.DrawFn) -> list[tuple[State, Event, Action, State]]:
    """Draw what can happen: the end of a recording comes only when one was begun, and then at once."""

    def steps() -> Iterator[tuple[State, Event, Action, State]]:
        state, is_recording = State.WAITING, False
        for _ in range(draw(st.integers(1, 12))):
            possible = [
                event for of, event in TRANSITIONS if of is state and (event in ENDS_OF_A_RECORDING) == is_recording
            ]
            event = draw(st.sampled_from(possible))
            action, then = TRANSITIONS[state, event]
            yield state, event, action, then
            state, is_recording = then, action in {Action.RECORD, Action.RECORD_AS_DONE}

    return list(steps())


@given(history=histories())
def test_a_claim_is_never_released_once_a_response_to_be_stored_was_started(
    history: list[tuple[State, Event, Action, State]],
) -> None:
    has_started = False
    for _, _, action, then in history:
        assert not (has_started and action is Action.RELEASE)
        has_started = has_started or then is State.SENDING


@given(history=histories())
def test_a_claim_ends_once(history: list[tuple[State, Event, Action, State]]) -> None:
    ends = [event for state, event, action, then in history if state in CLAIMED and then not in CLAIMED]
    assert len(ends) <= 1
    released = [action for _, _, action, _ in history if action is Action.RELEASE]
    recorded = [event for state, event, _, _ in history if state in CLAIMED and event in ENDS_OF_A_RECORDING]
    assert len(released) + len(recorded) <= 1


@given(history=histories())
def test_the_last_part_of_a_stored_response_is_sent_only_when_its_recording_has_ended(
    history: list[tuple[State, Event, Action, State]],
) -> None:
    for state, event, action, _ in history:
        if state in CLAIMED and event in {Event.LAST_PART, Event.OUTGROWN}:
            assert action in {Action.RECORD, Action.RECORD_AS_DONE}


@given(history=histories())
def test_the_client_never_gets_two_responses_nor_the_rest_of_one_that_does_not_count(
    history: list[tuple[State, Event, Action, State]],
) -> None:
    has_started, does_not_count = False, False
    for _, _, action, then in history:
        if action in {Action.SEND_NOT_RECORDED, Action.SEND_OUTCOME_UNKNOWN, Action.SEND_REPLAY}:
            assert not has_started
            does_not_count = True
        elif does_not_count:
            assert action in {Action.DROP, Action.RAISE}
        has_started = has_started or then is State.SENDING
        does_not_count = does_not_count or then is State.WITHHELD
