"""One claimed request while the app answers it: its response is recorded before the client has all of it.

What the app sends goes through `send` until the call has ended, and from then on past it:

    start, not to be stored      the claim is released, then it goes out
    start, to be stored          goes out; from here on the claim is never released
    … and says how long it is    held until the first message of the body, so that a failure can still be told
    body                         goes out at once; a bounded copy is kept
    the last of the body         recorded, then it goes out
    the copy grows too large     recorded as done, without the response
    the client is long gone      the same: an endless stream must not hold its key for ever
    broken off                   recorded as done, without the response; before the start: the claim is released
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
from functools import partial
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Final, NoReturn

from aidem._api.execution import Execution, running
from aidem._engine.call import Phase, WhoseOutcome
from aidem._http.answers import NOT_RECORDED, OUTCOME_UNKNOWN
from aidem._http.options import store_by_default
from aidem._http.response import ResponseCopy, text_of
from aidem._rules.record import OutcomeKind
from aidem._runtime.cancellation import CLEANUP_SECONDS, in_background
from aidem.exceptions import (
    IdempotencyLeaseLostError,
    IdempotencyPersistenceLayerError,
    IdempotencyUsageError,
)
from aidem.hooks import EventKind
from aidem.serialization import UNAVAILABLE_TEXT

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Generator

    from aidem._engine.call import Call
    from aidem._http.answers import Answers
    from aidem._http.options import HttpOptions
    from aidem._http.request import RequestBody
    from aidem._http.types import ASGIApp, Message, Scope, Send

logger = logging.getLogger("aidem")

_TAKEN_OUT: Final = ("http.response.pathsend", "http.response.zerocopysend", "http.response.trailers")
"""Extensions by which a response would pass unseen: files by name or descriptor, and what follows the body."""


LINGER_SECONDS: Final = 300.0
"""For how long a response that has begun goes on after its client has gone, so that a retry can get all of it."""

_GIVING_UP_SECONDS: Final = 2.0
"""How long before the end of the lease, at most, a recording that keeps failing is tried for the last time."""


class RequestExecution(Execution):
    """What `current_execution()` answers in the app: the outcome is the response."""

    __slots__ = ()

    def _encoded(self, result: Any) -> NoReturn:  # noqa: ARG002 - it is not looked at
        raise IdempotencyUsageError(
            "the outcome of a request is its response, which is recorded when it is sent; to complete a call in a "
            "transaction, decorate a function that the route calls with idempotent_function, or use idempotency(...)",
            key=self.key,
        )


class NotStoredError(Exception):
    """The response is not one to keep: why a claim is released although nothing was raised."""


class NoResponseError(BaseException):
    """The app ended without a response; no `Exception`, as it did not say that it has failed."""


class Exchange:
    """Runs the app for one claimed request; its `receive` and `send` are the app's."""

    __slots__ = (
        "_answers",
        "_call",
        "_disconnect",
        "_execution",
        "_gone_at",
        "_held_start",
        "_is_replaced",
        "_is_settled",
        "_is_unrecorded",
        "_options",
        "_recorder",
        "_request",
        "_scope",
        "_send",
        "_started_at",
        "_withheld_because",
    )

    _scope: Scope

    def __init__(self, call: Call, request: RequestBody, send: Send, answers: Answers, options: HttpOptions) -> None:
        self._answers = answers
        self._call = call
        self._execution = RequestExecution(call)
        self._request = request
        self._send = send
        self._options = options
        self._recorder: ResponseCopy | None = None
        self._held_start: Message | None = None
        self._is_replaced = False
        self._is_unrecorded = False  # recording it has failed
        self._withheld_because: str | None = None  # why the client must not get the rest
        self._is_settled = asyncio.Event()  # nothing is recorded any more
        self._disconnect: Message | None = None  # kept from the app
        self._gone_at = math.inf  # when the client went, in seconds of the loop's clock
        self._started_at = math.inf  # when the start of the response, the app's own, went out

    async def run(self, app: ASGIApp, scope: Scope) -> None:
        """Run the app to its end, and end the claim if its response has not."""
        self._scope = scope
        try:
            with running(self._execution), _without_extensions(scope):
                await app(scope, self.receive, self.send)
        except BaseException as error:
            await self._break_off(error)
            raise
        await self._break_off(NoResponseError())
        self._check_withheld()  # the app may have ended as if all were well; the server must not end the response

    # --- What the app sees --------------------------------------------------------------------------------------------

    async def receive(self) -> Message:
        """Hand out the request; keep it from the app that the client is gone, until the response is recorded.

        Starlette breaks off a streaming response when the client goes, and when the response is complete.
        """
        message = self._disconnect or await self._request.receive()
        if message["type"] == "http.disconnect":
            self._disconnect = message  # the app may stop waiting, and ask again
            self._note_that_the_client_is_gone()
            await self._outlast_the_client()
            self._disconnect = None
        return message

    @property
    def _has_started(self) -> bool:
        return self._started_at < math.inf

    def _note_that_the_client_is_gone(self) -> None:
        self._gone_at = min(self._gone_at, asyncio.get_running_loop().time())

    def _remaining_seconds(self) -> float:
        """Return for how long the response may still go on without its client."""
        return max(self._gone_at, self._started_at) + LINGER_SECONDS - asyncio.get_running_loop().time()

    async def _outlast_the_client(self) -> None:
        while not self._is_settled.is_set() and (remaining := self._remaining_seconds()) > 0:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(remaining, LINGER_SECONDS)):  # it may begin meanwhile
                    await self._is_settled.wait()

    async def send(self, message: Message) -> None:
        """Take the next message of the response."""
        kind = message["type"]
        if self._call.phase is not Phase.CLAIMED:
            await self._pass(message)
        elif kind == "http.response.start" and not self._has_started:
            await self._start(message)
        elif kind == "http.response.body" and self._recorder is not None:
            await self._continue(message, self._recorder)
        else:
            await self._pass(message)

    async def _start(self, message: Message) -> None:
        recorder = ResponseCopy(message, limit=self._options.max_response_bytes)
        # Copies go out: middleware further out edits what it gets, and what is recorded is what the app sent.
        message = {**message, "headers": list(recorder.headers)}
        if not self._is_stored(recorder):
            await self._release(NotStoredError())
        else:
            self._recorder = recorder
            if recorder.is_declared:
                self._held_start = message
                return
        await self._pass(message)

    async def _continue(self, message: Message, recorder: ResponseCopy) -> None:
        recorder.add(message)
        if recorder.is_too_large or not (recorder.is_complete or self._remaining_seconds() > 0):
            await self._record_without_response()
        elif recorder.is_complete:
            await self._record(text_of(recorder.response(store_set_cookie=self._options.store_set_cookie)))
        if self._held_start is not None:
            start, self._held_start = self._held_start, None
            await self._pass(start)
        await self._pass({**message})

    async def _pass(self, message: Message) -> None:
        if self._is_replaced:
            return  # the client has got another answer
        if self._is_unrecorded and not self._call.holds_lease(for_seconds=_GIVING_UP_SECONDS):
            self._withheld_because = "its response could not be recorded, and a retry may get another one"
        self._check_withheld()
        if message["type"] == "http.response.start":
            self._started_at = asyncio.get_running_loop().time()  # though sending it may be interrupted
        try:
            await self._send(message)
        except OSError:  # so do servers say that the client is gone
            if self._call.phase is not Phase.CLAIMED:
                raise
            self._note_that_the_client_is_gone()

    def _check_withheld(self) -> None:
        """Raise `IdempotencyLeaseLostError` if the rest is withheld, without which no client takes it for whole."""
        if self._withheld_because is not None:
            call = self._call
            raise IdempotencyLeaseLostError(key=call.key.text, record=call.record, reason=self._withheld_because)

    def _is_stored(self, recorder: ResponseCopy) -> bool:
        if self._options.store_if is store_by_default and _is_unserved(self._scope, recorder):
            return False
        try:
            return self._options.store_if(recorder.status, list(recorder.headers))
        except Exception as error:  # noqa: BLE001 - whatever a function of the user's raises
            # No trace: it may show what is in the headers.
            logger.error("store_if of %s raised %s", self._call.plan.function, type(error).__name__)  # noqa: TRY400
            return True  # or the request would run again

    # --- How the claim ends -------------------------------------------------------------------------------------------

    async def _record(self, text: str, outcome: OutcomeKind | None = None) -> None:
        """Record the response; what counts goes out in its place if it is another, or if that is not known."""
        try:
            whose = await self._call.complete(text, outcome)
        except IdempotencyLeaseLostError:
            await self._replace(partial(self._answers.answer, OUTCOME_UNKNOWN))
        except IdempotencyPersistenceLayerError as failure:
            await self._recording_failed(failure)
        else:
            if whose is WhoseOutcome.WINNERS:
                await self._replace(partial(self._answers.hand_out, self._call))
            elif self._call.held_record().outcome is OutcomeKind.UNAVAILABLE:
                self._report(EventKind.RESULT_UNAVAILABLE)
        finally:
            self._recorder = None  # the copy is not needed any more, and what follows may take long
            self._is_settled.set()

    async def _record_without_response(self) -> None:
        await self._record(UNAVAILABLE_TEXT, OutcomeKind.UNAVAILABLE)

    async def _recording_failed(self, failure: IdempotencyPersistenceLayerError) -> None:
        logger.error("a response of %s was not recorded: %s", self._call.plan.function, failure)
        self._report(EventKind.PERSISTENCE_ERROR, failure)
        if self._has_started:
            self._is_unrecorded = True
        else:
            await self._replace(partial(self._answers.answer, NOT_RECORDED))

    async def _replace(self, send: Callable[[], Awaitable[None]]) -> None:
        """Send something else than the app's response, which does not count.

        Raises:
            IdempotencyLeaseLostError: Some of it has gone out; the rest is withheld.
        """
        if self._has_started:
            self._withheld_because = "another call took it over, and a retry will get that one's response"
            self._check_withheld()
        self._is_replaced = True
        await send()

    async def _break_off(self, error: BaseException) -> None:
        """End a claim whose response did not come to its end."""
        if self._call.phase is not Phase.CLAIMED:
            return
        if not self._has_started:
            await self._release(error)
        elif isinstance(error, GeneratorExit):  # nothing may be awaited any more
            in_background(self._record_without_response)
        else:
            is_cancelled = isinstance(error, asyncio.CancelledError)
            await self._mark_as_done(within_seconds=CLEANUP_SECONDS if is_cancelled else None)

    async def _mark_as_done(self, *, within_seconds: float | None) -> None:
        try:
            async with asyncio.timeout(within_seconds):
                await self._record_without_response()
        except IdempotencyLeaseLostError:
            pass  # what broke it off goes first
        except TimeoutError:
            logger.error("a response of %s was broken off, and could not be recorded in time", self._call.plan.function)  # noqa: TRY400 - no trace: it may show data

    async def _release(self, error: BaseException) -> None:
        try:
            await self._call.fail(error)
        finally:
            self._is_settled.set()

    def _report(self, kind: EventKind, error: BaseException | None = None) -> None:
        self._call.reporter.report(kind, fence=self._call.fence, error=error)


def _is_unserved(scope: Scope, recorder: ResponseCopy) -> bool:
    """Whether nothing in the app serves such a request: a router answers it, which knows no such path or method."""
    if recorder.status == HTTPStatus.METHOD_NOT_ALLOWED:
        allowed = b",".join(recorder.values(b"allow")).decode("latin-1").replace(" ", "")
        methods = getattr(scope.get("route"), "methods", None) or (allowed and allowed.split(","))
        return bool(methods) and scope["method"] not in methods
    return recorder.status == HTTPStatus.NOT_FOUND and "router" in scope and _ends_at_a_router(scope.get("endpoint"))


def _ends_at_a_router(endpoint: Any) -> bool:
    """Whether the search for a route has ended there: where Starlette's finds none, it leaves the endpoint as it was.

    That is none, or the app that the router is mounted as, maybe within middleware.
    """
    is_found = endpoint is not None
    while endpoint is not None and not hasattr(endpoint, "routes"):
        endpoint = getattr(endpoint, "app", None)
    return not is_found or endpoint is not None


@contextlib.contextmanager
def _without_extensions(scope: Scope) -> Generator[None]:
    """Take them out of the scope itself: who is further out reads in it what the app has written, such as the route."""
    extensions = scope.get("extensions")
    if not extensions or not any(name in extensions for name in _TAKEN_OUT):
        yield
        return
    scope["extensions"] = {name: value for name, value in extensions.items() if name not in _TAKEN_OUT}
    try:
        yield
    finally:
        scope["extensions"] = extensions
