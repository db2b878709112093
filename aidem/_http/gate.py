"""Decides for each request: it goes to the app unchanged, is refused, gets a replay, or runs under a claim."""

from __future__ import annotations

import inspect
import logging
from contextvars import ContextVar
from typing import TYPE_CHECKING, Final

from aidem._api.execution import enter, leave
from aidem._engine.call import Phase
from aidem._engine.plan import CallFactory, CallKey, is_bypassed
from aidem._http.answers import (
    ANSWERED_ERRORS,
    BODY_INCOMPLETE,
    CALLER_UNKNOWN,
    RefusedError,
    is_http_exception,
    send_problem,
    send_replay,
)
from aidem._http.exchange import Exchange, RequestExecution
from aidem._http.request import OF_A_REQUEST, Request, chosen_digest, lookup_key, parse_key, request_parts
from aidem._http.response import StoredResponses
from aidem.exceptions import IdempotencyPersistenceLayerError, IdempotencyUsageError
from aidem.hooks import EventKind, Reporter

if TYPE_CHECKING:
    from aidem._engine.call import Call
    from aidem._http.options import HttpOptions
    from aidem._http.types import ASGIApp, Receive, Scope, Send

logger = logging.getLogger("aidem")

_REPLAYED, _CLAIMED = Phase.REPLAYED, Phase.CLAIMED  # to look a member up on its enum costs as much as a call
_REQUEST: Final = "aidem.request"
"""Where a scope, and every copy of it, says which request it is of."""

_served: Final[ContextVar[tuple[tuple[object, str, str], ...]]] = ContextVar("aidem_served", default=())
"""The requests that layers further out serve, with key and payload hash.

A scope cannot tell, as it may be used twice at once.
"""


class Gate:
    """Serves the requests of one app or route. It keeps nothing of any request.

    Attributes:
        options: The options of the middleware or the route class.
        function: The name of the layer in logs and events.
        calls: Makes the call of each request.
    """

    __slots__ = ("_has_warned", "calls", "function", "options")

    def __init__(self, options: HttpOptions) -> None:
        self.options = options
        self.function = f"the HTTP layer {options.key_prefix!r}"
        self._has_warned = False
        self.calls = CallFactory(
            function=self.function,
            prefix=lambda: options.key_prefix,
            layer=options.persistence_store,
            config=options.settings,
            output_serializer=StoredResponses(max_body_bytes=options.max_response_bytes),
        )

    async def serve(self, app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request. Requests without a key, and everything that is not a request, go to the app unchanged."""
        options = self.options
        if scope["type"] != "http" or scope["method"].upper() not in options.methods:
            await app(scope, receive, send)
            return
        request = Request(scope, receive)
        values = request.values(options.key_header)
        if not (values or options.required):
            await app(scope, receive, send)
            return
        try:
            call = await self._begun_call(scope, values, request)
        except RefusedError as refused:
            try:
                await send_problem(refused.problem, options, scope, send, headers=refused.headers)
            except OSError:
                if refused.problem is not BODY_INCOMPLETE:  # else the client is known to be gone
                    raise
            return
        if call is None:
            await app(scope, request.rest, send)
        elif call.phase is _REPLAYED:
            await send_replay(call, options, scope, send)
        else:
            await self._run(call, app, scope, request, send)

    async def _begun_call(self, scope: Scope, values: list[bytes], request: Request) -> Call | None:
        """Decide what is done with a request, and begin its call.

        Returns:
            A call that is claimed, replayed or bypassed. None: the request goes to the app without one.

        Raises:
            RefusedError: The client gets a problem.
        """
        options = self.options
        if is_bypassed(self.function):
            return await self._bypassed_call(scope, values)
        name = parse_key(values, strict=options.strict)
        space = await self._space(scope)
        if space == "":
            if options.required:
                raise RefusedError(CALLER_UNKNOWN)
            self._note_unknown_caller()
            return None
        payload_hash = await request.read(limit=options.max_request_bytes, hash_function=options.settings.hash_function)
        key = self._lookup_key(name, space, OF_A_REQUEST + (self._chosen_hash(scope, request) or payload_hash))
        if (scope.setdefault(_REQUEST, object()), key.text, key.payload_hash) in _served.get():
            return None  # a layer further out, with the same prefix, serves it under this key
        call = self.calls.make(
            lambda plan: (
                key
                if plan.config.note is None and plan.check is None
                else key._replace(note=plan.note_of(scope), payload=scope)
            )
        )
        try:
            await call.begin()
        except ANSWERED_ERRORS as error:
            if isinstance(error, IdempotencyPersistenceLayerError):
                logger.error("%s refuses a request: %s", self.function, error)  # noqa: TRY400 - the trace has nothing of the user's
            raise RefusedError.by(error, has_check=call.plan.check is not None) from error
        except BaseException as error:
            await call.fail(error)  # of a hook, when the key was claimed already
            raise
        return call

    async def _bypassed_call(self, scope: Scope, values: list[bytes]) -> Call:
        """Begin a call without idempotency. It has a key for `current_execution().key_for()` if the request has one."""
        key = CallKey("")
        try:
            name = parse_key(values, strict=self.options.strict)
            space = await self._space(scope)
            if space != "":
                key = self._lookup_key(name, space)
        except Exception as error:
            cause = error.__cause__ if isinstance(error, RefusedError) else error
            if isinstance(cause, Exception) and is_http_exception(cause):  # it may be all that checks the caller
                raise
        call = self.calls.bypassed(lambda _plan: key)
        await call.begin()
        return call

    async def _space(self, scope: Scope) -> str | None:
        """Return the caller to whom the key belongs; None: all callers share their keys; `""`: no caller was found.

        Raises:
            RefusedError: The scope function raised an `HTTPException`, and no handlers of Starlette are further out.
        """
        if self.options.scope is None:
            return None
        try:
            space = self.options.scope(scope)
            if not isinstance(space, str) and inspect.isawaitable(space):
                space = await space
        except Exception as error:
            if is_http_exception(error) and "starlette.exception_handlers" not in scope:
                raise RefusedError.by_http_exception(error) from error
            raise
        if space is None:
            return ""
        if not isinstance(space, str):  # pyright: ignore[reportUnnecessaryIsInstance] - of whatever type it is
            raise IdempotencyUsageError("scope(request_scope) must return a string, or None for a request without one")
        return space

    def _note_unknown_caller(self) -> None:
        """Report a request that is bypassed to hooks. Log it only once, as clients decide how many there are."""
        Reporter(self.options.settings.hooks, key="", function=self.function).report(EventKind.BYPASSED)
        if not self._has_warned:
            self._has_warned = True
            message = "%s runs a request without idempotency: it has a key, but `scope` found no caller (logged once)"
            logger.warning(message, self.function)

    def _lookup_key(self, name: str, space: str | None, payload_hash: str = "") -> CallKey:
        options = self.options
        hash_function = options.settings.hash_function
        return CallKey(lookup_key(options.key_prefix, space=space, key=name, hash_function=hash_function), payload_hash)

    def _chosen_hash(self, scope: Scope, request: Request) -> str | None:
        """Return the hash of what the option `fingerprint` chooses; None: that of the whole request counts."""
        if self.options.fingerprint is None:
            return None
        parts = request_parts(scope, request.whole)
        try:
            chosen = self.options.fingerprint(parts)
        except Exception as error:  # noqa: BLE001 - whatever a function of the user's raises for what a client sent
            # No trace: it may show what is in the request.
            logger.error("fingerprint of %s raised %s; the default is used", self.function, type(error).__name__)  # noqa: TRY400
            return None
        if chosen is None:
            return None
        if not isinstance(chosen, bytes):  # pyright: ignore[reportUnnecessaryIsInstance] - of whatever type it is
            raise IdempotencyUsageError("fingerprint(request) must return bytes, or None for the default")
        return chosen_digest(parts, chosen, self.options.settings.hash_function)

    async def _run(self, call: Call, app: ASGIApp, scope: Scope, request: Request, send: Send) -> None:
        """Run the app, under the claim or bypassed. Layers further in that make the same key let this request pass."""
        token = _served.set((*_served.get(), (scope.get(_REQUEST), call.key.text, call.key.payload_hash)))
        try:
            if call.phase is _CLAIMED:
                await Exchange(call, request, self.options, scope, send).run(app)
            else:  # handlers have an execution all the same, for `key_for`
                execution = RequestExecution(call)
                outer = enter(execution)
                try:
                    await app(scope, request.rest, send)
                finally:
                    leave(outer)
        finally:  # code further out may try again with the same scope
            try:  # noqa: SIM105 - cheaper than contextlib.suppress, for every request
                _served.reset(token)
            except ValueError:
                pass  # closed from another context, where it never was set
