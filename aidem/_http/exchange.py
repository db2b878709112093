"""The I/O around the states of a response: runs the app under a claim, and carries out what `states` decides."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
from functools import partial
from typing import TYPE_CHECKING, Any, Final, NoReturn

from aidem._api.execution import Execution, enter, leave
from aidem._engine.call import WhoseOutcome
from aidem._http.answers import NOT_RECORDED, OUTCOME_UNKNOWN, send_problem, send_replay
from aidem._http.response import ResponseCopy, is_of_no_route, store_by_default
from aidem._http.states import TRANSITIONS, Action, Event, State
from aidem._rules.record import OutcomeKind
from aidem._runtime.cancellation import CLEANUP_SECONDS, in_background
from aidem.exceptions import IdempotencyLeaseLostError, IdempotencyPersistenceLayerError, IdempotencyUsageError
from aidem.hooks import EventKind
from aidem.serialization import UNAVAILABLE_TEXT

if TYPE_CHECKING:
    from aidem._engine.call import Call
    from aidem._http.options import HttpOptions
    from aidem._http.request import Request
    from aidem._http.types import ASGIApp, Message, Scope, Send

logger = logging.getLogger("aidem")

_TAKEN_OUT: Final = frozenset({"http.response.pathsend", "http.response.zerocopysend", "http.response.trailers"})
"""Extensions by which a response would pass unseen: files by name or descriptor, and what follows the body."""

LINGER_SECONDS: Final = 300.0
"""How long a response that has begun may go on after its client has disconnected, so that a retry can get it."""

_GIVING_UP_SECONDS: Final = 2.0
"""How long before the end of the lease, at most, a recording that keeps failing is tried for the last time."""


# Members that every request needs. Looking one up on its enum costs as much as a call.
_WAITING, _HELD, _SENDING = State.WAITING, State.HELD, State.SENDING
_UNRECORDED, _REPLACED, _WITHHELD = State.UNRECORDED, State.REPLACED, State.WITHHELD
_PASS, _HOLD, _RAISE = Action.PASS, Action.HOLD, Action.RAISE
_RELEASE, _RECORD, _RECORD_AS_DONE = Action.RELEASE, Action.RECORD, Action.RECORD_AS_DONE
_MESSAGE, _PART, _RECORDED = Event.MESSAGE, Event.PART, Event.RECORDED
_START_WITH_LENGTH, _START_STREAMED = Event.START_WITH_LENGTH, Event.START_STREAMED
_WINNERS, _UNAVAILABLE = WhoseOutcome.WINNERS, OutcomeKind.UNAVAILABLE
_ENDS_CLAIM: Final = frozenset({_RELEASE, _RECORD, _RECORD_AS_DONE})
_IS_CLAIMED: Final = frozenset({_WAITING, _HELD, _SENDING})


class RequestExecution(Execution):
    """The execution that `current_execution()` returns in the app; its outcome is the response."""

    __slots__ = ()

    def _encoded(self, result: Any) -> NoReturn:  # noqa: ARG002 - it is not looked at
        raise IdempotencyUsageError(
            "the outcome of a request is its response, which is recorded when it is sent; to complete a call in a "
            "transaction, decorate a function that the route calls with idempotent_function, or use idempotency(...)",
            key=self.key,
        )


class NotStoredError(Exception):
    """The reason why a claim is released when the response is not to be stored."""


class NoResponseError(BaseException):
    """The app returned without a response. Not an `Exception`: the app did not say that it has failed."""


class Exchange:
    """Runs the app for one claimed request; its `receive` and `send` are the app's."""

    __slots__ = (
        "_call",
        "_copy",
        "_disconnect",
        "_gone_at",
        "_held_start",
        "_is_settled",
        "_options",
        "_request",
        "_scope",
        "_send",
        "_settled",
        "_started_at",
        "_state",
        "_withheld_because",
    )

    def __init__(self, call: Call, request: Request, options: HttpOptions, scope: Scope, send: Send) -> None:
        self._call = call
        self._request = request
        self._options = options
        self._scope = scope
        self._send = send
        self._state = _WAITING
        self._copy: ResponseCopy | None = None  # while HELD or SENDING
        self._held_start: Message | None = None
        self._withheld_because = ""
        self._is_settled = False  # the claim has ended, or will end without a response
        self._settled: asyncio.Event | None = None  # set then; made if the app waits for a disconnect
        self._disconnect: Message | None = None  # withheld from the app
        self._gone_at = math.inf  # when the client disconnected, in seconds of the loop's clock
        self._started_at = math.inf  # when the start of the response was sent

    async def run(self, app: ASGIApp) -> None:
        """Run the app to its end, and end the claim if its response has not."""
        execution = RequestExecution(self._call)
        try:
            token = enter(execution)
            try:
                if _TAKEN_OUT.isdisjoint(self._scope.get("extensions") or ()):
                    await app(self._scope, self.receive, self.send)
                else:
                    await self._run_without_extensions(app)
            finally:
                leave(token)
        except BaseException as error:
            await self._break_off(error)
            raise
        if self._state in _IS_CLAIMED:
            await self._break_off(NoResponseError())
        if self._state is _WITHHELD:  # the app may end as if all were well; the server must not end the response
            raise self._error()

    async def _run_without_extensions(self, app: ASGIApp) -> None:
        """Change the scope itself, no copy: middleware further out reads what the app adds to it, such as the route."""
        scope, extensions = self._scope, self._scope["extensions"]
        scope["extensions"] = {name: value for name, value in extensions.items() if name not in _TAKEN_OUT}
        try:
            await app(scope, self.receive, self.send)
        finally:
            scope["extensions"] = extensions

    # --- What the app sees --------------------------------------------------------------------------------------------

    async def receive(self) -> Message:
        """Return the next message of the request. Withhold a disconnect until the response is recorded.

        Starlette cancels a streaming response when it receives a disconnect, even after the last part was sent.
        """
        message = self._disconnect or await self._request.receive()
        if message["type"] == "http.disconnect":
            self._disconnect = message  # the app may stop waiting, and ask again
            self._note_that_the_client_is_gone()
            await self._outlast_the_client()
            self._disconnect = None
        return message

    async def _outlast_the_client(self) -> None:
        if self._settled is None:
            self._settled = asyncio.Event()
        while not self._is_settled and (remaining := self._remaining_seconds()) > 0:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(remaining, LINGER_SECONDS)):  # it may begin meanwhile
                    await self._settled.wait()

    def _note_that_the_client_is_gone(self) -> None:
        self._gone_at = min(self._gone_at, asyncio.get_running_loop().time())

    def _remaining_seconds(self) -> float:
        """Return how much longer the response may go on without its client."""
        return max(self._gone_at, self._started_at) + LINGER_SECONDS - asyncio.get_running_loop().time()

    async def send(self, message: Message) -> None:
        """Take the next message of the response.

        Copies are sent: middleware further out edits what it gets, and what is recorded is what the app sent.
        """
        kind = message["type"]
        event = _MESSAGE
        if kind == "http.response.body" and self._copy is not None:
            message = {**message}
            event = self._copy.add(message)
            if event is _PART and self._remaining_seconds() <= 0:
                event = Event.OUTGROWN
        elif kind == "http.response.start" and (self._state is _WAITING or self._state is _HELD):
            response = ResponseCopy(message, limit=self._options.max_response_bytes)
            message = {**message, "headers": list(response.headers)}
            event = self._start_event(response)
            self._copy, self._held_start = response, None
        action = self._next(event)
        if action in _ENDS_CLAIM:
            action = await self._end_claim(action)
        if action is _HOLD:
            self._held_start = message
        elif action is _PASS:
            await self._pass(message)
        elif action is _RAISE:
            raise self._error()

    def _start_event(self, response: ResponseCopy) -> Event:
        """Return what the start of a response means."""
        store_if = self._options.store_if
        if store_if is store_by_default:
            is_final = store_by_default(response.status, response.headers)
            is_stored = is_final and not is_of_no_route(self._scope, response)
        else:
            try:
                is_stored = store_if(response.status, list(response.headers))
            except Exception as error:  # noqa: BLE001 - whatever a function of the user's raises
                # No trace: it may show what is in the headers.
                logger.error("store_if of %s raised %s", self._call.plan.function, type(error).__name__)  # noqa: TRY400
                is_stored = True  # or the request would run again
        if not is_stored:
            return Event.START_NOT_STORED
        return _START_STREAMED if response.length is None else _START_WITH_LENGTH

    def _next(self, event: Event) -> Action:
        """Change the state; return what is to be done."""
        action, self._state = TRANSITIONS[self._state, event]
        return action

    async def _pass(self, message: Message) -> None:
        if self._state is not _HELD and self._held_start is not None:
            start, self._held_start = self._held_start, None
            await self._pass(start)
        if self._state is _UNRECORDED and not self._call.holds_lease(for_seconds=_GIVING_UP_SECONDS):
            self._next(Event.LEASE_ENDING)
            self._withheld_because = "its response could not be recorded, and a retry may get another one"
            raise self._error()
        if self._state is _SENDING and message["type"] == "http.response.start":
            self._started_at = asyncio.get_running_loop().time()  # though sending it may be interrupted
        try:
            await self._send(message)
        except OSError:  # so do servers say that the client is gone
            if self._state not in _IS_CLAIMED:
                raise
            self._note_that_the_client_is_gone()

    def _error(self) -> IdempotencyLeaseLostError:
        """Return the error that withholds the rest of a response: the client sees that it is incomplete."""
        call = self._call
        return IdempotencyLeaseLostError(key=call.key.text, record=call.record, reason=self._withheld_because)

    # --- How the claim ends -------------------------------------------------------------------------------------------

    async def _end_claim(self, action: Action, error: BaseException | None = None) -> Action:
        """Release the claim, or record the response; return what is to be done with the message.

        Args:
            action: RELEASE, RECORD or RECORD_AS_DONE.
            error: The exception that broke the response off. None: the response is not to be stored.
        """
        try:
            if action is _RELEASE:
                self._held_start = None
                await self._call.fail(error or NotStoredError())
                return _PASS
            try:
                event = await self._record(has_response=action is _RECORD)
            except BaseException:
                self._held_start = None
                self._next(Event.INTERRUPTED)
                raise
            action = self._next(event)
            if self._state is _REPLACED:
                await self._replace(action)
            elif self._state is _WITHHELD:
                self._withheld_because = "another call took it over, and a retry will get that one's response"
            return action
        finally:
            # Not before: an app that receives the disconnect may cancel what is being sent in place of its response.
            self._copy = None
            self._is_settled = True
            if self._settled is not None:
                self._settled.set()

    async def _record(self, *, has_response: bool) -> Event:
        """Record the response, or only that the request is done; return how that ended."""
        call = self._call
        text, outcome = UNAVAILABLE_TEXT, None if has_response else _UNAVAILABLE
        if has_response and self._copy is not None:
            text = self._copy.text(store_set_cookie=self._options.store_set_cookie)
        try:
            whose = await call.complete(text, outcome)
        except IdempotencyLeaseLostError:
            return Event.CLAIM_LOST
        except IdempotencyPersistenceLayerError as failure:
            logger.error("a response of %s was not recorded: %s", call.plan.function, failure)  # noqa: TRY400 - the trace has nothing of the user's
            call.reporter.report(EventKind.PERSISTENCE_ERROR, fence=call.fence, error=failure)
            return Event.NOT_RECORDED
        if whose is _WINNERS:
            return Event.OTHER_RECORDED
        if call.held_record().outcome is _UNAVAILABLE:
            call.reporter.report(EventKind.RESULT_UNAVAILABLE, fence=call.fence)
        return _RECORDED

    async def _replace(self, action: Action) -> None:
        """Send another response in place of the app's, which does not count."""
        options, scope, send = self._options, self._scope, self._send
        if action is Action.SEND_REPLAY:
            await send_replay(self._call, options, scope, send)
        else:
            problem = NOT_RECORDED if action is Action.SEND_NOT_RECORDED else OUTCOME_UNKNOWN
            await send_problem(problem, options, scope, send)

    async def _break_off(self, error: BaseException) -> None:
        """End a claim whose response is not complete. An exception of the app takes precedence over failures here."""
        action = self._next(Event.BROKEN_OFF)
        if action is _RELEASE:
            await self._end_claim(action, error)
        elif action is _RECORD_AS_DONE and isinstance(error, GeneratorExit):  # nothing may be awaited any more
            in_background(partial(self._end_claim, action, error))
        elif action is _RECORD_AS_DONE:
            is_cancelled = isinstance(error, asyncio.CancelledError)
            try:
                async with asyncio.timeout(CLEANUP_SECONDS if is_cancelled else None):
                    await self._end_claim(action, error)
            except TimeoutError:
                function = self._call.plan.function
                logger.error("a response of %s was broken off, and could not be recorded in time", function)  # noqa: TRY400 - no trace: it may show data
