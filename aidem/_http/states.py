"""The states of a response under a claim, as data: what each event does in each state. `Exchange` does the I/O.

The order of the steps is what makes a retry safe:

- A response is recorded before the last part of its body is sent. A client that has the whole response can lose its
  connection at once and retry: the retry finds the record.
- Once the start of a response that is to be stored has been sent, the claim is never released, whatever happens: the
  client may have seen the status, so the request must not run again.
- A response that declares its length most likely comes at once. Its start is held until the first part of the body, so
  that a recording that fails can still be answered with an error instead.
- A response whose recording has failed is sent only as long as the lease holds. After that a retry may run, and two
  clients would have two different responses; so the last part is withheld, and no client takes the rest for the whole.

The state changes before the action is carried out: an action that is interrupted has happened, for all we know.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Final


class State(StrEnum):
    """How far a response has come. The call holds its claim in the first three states and has ended in the others."""

    WAITING = "waiting"
    """The app has not started a response."""
    HELD = "held"
    """The start is held, the client has nothing."""
    SENDING = "sending"
    """The start of a response to be stored has been sent."""
    PASSING = "passing"
    """The claim is released or the response recorded. Everything the app sends is passed on."""
    UNRECORDED = "unrecorded"
    """Recording failed after the start was sent. Messages are passed on while the lease holds."""
    REPLACED = "replaced"
    """The client gets another response in place of the app's."""
    WITHHELD = "withheld"
    """The client has a part of a response that does not count, and must not get the rest."""


class Event(StrEnum):
    """What the app does, how the recording of a response ends, and the end of the lease."""

    START_NOT_STORED = "start_not_stored"
    START_WITH_LENGTH = "start_with_length"
    """Starts a response to be stored that declares its length."""
    START_STREAMED = "start_streamed"
    """Starts a response to be stored that does not."""
    PART = "part"
    LAST_PART = "last_part"
    OUTGROWN = "outgrown"
    """A part makes the response larger than `max_response_bytes`, or comes too long after the client has gone."""
    MESSAGE = "message"
    """Sends another message, such as an early hint; or any message once the call has ended."""
    BROKEN_OFF = "broken_off"
    """Raises, is cancelled or returns."""

    RECORDED = "recorded"
    NOT_RECORDED = "not_recorded"
    """The persistence layer failed."""
    CLAIM_LOST = "claim_lost"
    """Another call took over the claim, and has no outcome yet."""
    OTHER_RECORDED = "other_recorded"
    """Another call took over the claim, and its response is recorded."""
    INTERRUPTED = "interrupted"
    """An exception, such as a cancellation, ended the recording."""

    LEASE_ENDING = "lease_ending"
    """A message is to be passed on, but another call may soon take over."""


class Action(StrEnum):
    """What `Exchange` does next."""

    PASS = "pass"  # noqa: S105 - no password
    """Send the start that was held, if any, then the message."""
    HOLD = "hold"
    DROP = "drop"
    RAISE = "raise"
    """Raise an error in the app, so that the server closes the connection before the response is complete."""
    RELEASE = "release"
    """Release the claim, then pass the message."""
    RECORD = "record"
    """Record the response. The next event is how that ends."""
    RECORD_AS_DONE = "record_as_done"
    """Record that the request is done, without its response. The next event is how that ends."""
    SEND_NOT_RECORDED = "send_not_recorded"
    """Answer with the problem `not-recorded`."""
    SEND_OUTCOME_UNKNOWN = "send_outcome_unknown"
    """Answer with the problem `outcome-unknown`."""
    SEND_REPLAY = "send_replay"
    """Answer with the response that is recorded."""


_STARTS: Final = {
    Event.START_NOT_STORED: (Action.RELEASE, State.PASSING),
    Event.START_WITH_LENGTH: (Action.HOLD, State.HELD),
    Event.START_STREAMED: (Action.PASS, State.SENDING),
}

_IS_OVER: Final = {
    State.PASSING: Action.PASS,
    State.UNRECORDED: Action.PASS,
    State.REPLACED: Action.DROP,
    State.WITHHELD: Action.RAISE,
}

TRANSITIONS: Final[dict[tuple[State, Event], tuple[Action, State]]] = {
    **{(state, event): step for state in (State.WAITING, State.HELD) for event, step in _STARTS.items()},
    (State.WAITING, Event.MESSAGE): (Action.PASS, State.WAITING),
    (State.WAITING, Event.BROKEN_OFF): (Action.RELEASE, State.PASSING),
    (State.HELD, Event.MESSAGE): (Action.PASS, State.HELD),
    (State.HELD, Event.PART): (Action.PASS, State.SENDING),
    (State.HELD, Event.LAST_PART): (Action.RECORD, State.HELD),
    (State.HELD, Event.OUTGROWN): (Action.RECORD_AS_DONE, State.HELD),
    (State.HELD, Event.RECORDED): (Action.PASS, State.PASSING),
    (State.HELD, Event.NOT_RECORDED): (Action.SEND_NOT_RECORDED, State.REPLACED),
    (State.HELD, Event.CLAIM_LOST): (Action.SEND_OUTCOME_UNKNOWN, State.REPLACED),
    (State.HELD, Event.OTHER_RECORDED): (Action.SEND_REPLAY, State.REPLACED),
    (State.HELD, Event.INTERRUPTED): (Action.PASS, State.PASSING),
    (State.HELD, Event.BROKEN_OFF): (Action.RELEASE, State.PASSING),
    (State.SENDING, Event.MESSAGE): (Action.PASS, State.SENDING),
    (State.SENDING, Event.PART): (Action.PASS, State.SENDING),
    (State.SENDING, Event.LAST_PART): (Action.RECORD, State.SENDING),
    (State.SENDING, Event.OUTGROWN): (Action.RECORD_AS_DONE, State.SENDING),
    (State.SENDING, Event.RECORDED): (Action.PASS, State.PASSING),
    (State.SENDING, Event.NOT_RECORDED): (Action.PASS, State.UNRECORDED),
    (State.SENDING, Event.CLAIM_LOST): (Action.RAISE, State.WITHHELD),
    (State.SENDING, Event.OTHER_RECORDED): (Action.RAISE, State.WITHHELD),
    (State.SENDING, Event.INTERRUPTED): (Action.PASS, State.PASSING),
    (State.SENDING, Event.BROKEN_OFF): (Action.RECORD_AS_DONE, State.SENDING),
    (State.UNRECORDED, Event.LEASE_ENDING): (Action.RAISE, State.WITHHELD),
    # When the call has ended, only the end of the lease changes the state. Other events may still come, of tasks that
    # the app has left behind.
    **{
        (state, event): (action, state)
        for state, action in _IS_OVER.items()
        for event in Event
        if event is not Event.LEASE_ENDING
    },
}
"""The action and the next state for each event that can happen in a state."""
