"""The gate that every request comes to: it passes, is refused, gets a recorded response, or runs under a claim."""

from __future__ import annotations

import contextlib
import inspect
import logging
from contextvars import ContextVar
from typing import TYPE_CHECKING, Final

from aidem._api.execution import running
from aidem._engine.call import Phase
from aidem._engine.plan import CallFactory, CallKey, is_bypassed
from aidem._http import answers
from aidem._http.exchange import Exchange, RequestExecution
from aidem._http.fingerprint import Fingerprint, chosen_digest, lookup_key, request_parts
from aidem._http.key import MalformedKeyError, parse_key
from aidem._http.request import BodyTooLargeError, ClientGoneError, RequestBody
from aidem._http.types import header_values
from aidem.exceptions import IdempotencyPersistenceLayerError, IdempotencyUsageError
from aidem.hooks import EventKind, Reporter

if TYPE_CHECKING:
    from aidem._engine.call import Call
    from aidem._http.options import HttpOptions
    from aidem._http.types import ASGIApp, FingerprintFunction, Receive, RequestParts, Scope, Send

logger = logging.getLogger("aidem")

_REQUEST: Final = "aidem.request"
"""Where a scope, and every copy of it, says which request it is of."""

_served: Final[ContextVar[tuple[tuple[object, CallKey], ...]]] = ContextVar("aidem_served", default=())
"""Which requests are served further out, under which keys; not in the scope alone, which may be used twice at once."""


class Gate:
    """Serves the requests of one app or route; it holds nothing of any of them.

    Attributes:
        options: What it was told.
        function: What the log and observers call it.
        calls: Makes the call of each request.
    """

    __slots__ = ("_has_warned", "_header", "calls", "function", "options")

    def __init__(self, options: HttpOptions) -> None:
        self.options = options
        self.function = f"the HTTP layer {options.key_prefix!r}"
        self._header = options.header_name.lower().encode("ascii")
        self._has_warned = False
        self.calls = CallFactory(
            function=self.function,
            prefix=lambda: options.key_prefix,
            layer=options.persistence_store,
            config=options.settings,
        )

    async def serve(self, app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request; requests without a key, and everything that is not one, go to the app unchanged."""
        is_concerned = scope["type"] == "http" and scope["method"].upper() in self.options.methods
        values = header_values(scope["headers"], self._header) if is_concerned else []
        if not (is_concerned and (values or self.options.required)):
            await app(scope, receive, send)
        elif is_bypassed(self.function):
            await _Visit(self, app, scope, receive, send).run_bypassed(values)
        else:
            await _Visit(self, app, scope, receive, send).run(values)

    def lookup_key(self, key: str, *, space: str | None, payload_hash: str = "") -> CallKey:
        """Return what names a call."""
        options = self.options
        hash_function = options.settings.hash_function
        return CallKey(lookup_key(options.key_prefix, space=space, key=key, hash_function=hash_function), payload_hash)

    def note_unknown_caller(self) -> None:
        """Tell observers of a request that is bypassed; the log once, as clients decide how many there are."""
        Reporter(self.options.settings.hooks, key="", function=self.function).report(EventKind.BYPASSED)
        if not self._has_warned:
            self._has_warned = True
            message = "%s runs a request without idempotency: it has a key, but `scope` found no caller (logged once)"
            logger.warning(message, self.function)


class _Visit:
    """One request at the gate."""

    __slots__ = ("_answers", "_app", "_gate", "_options", "_receive", "_scope", "_send")

    def __init__(self, gate: Gate, app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
        self._gate = gate
        self._options = gate.options
        self._app = app
        self._scope = scope
        self._receive = receive
        self._send = send
        self._answers = answers.Answers(gate.options, scope, send)

    async def run_bypassed(self, values: list[bytes]) -> None:
        """Run the app, bypassed; its handlers have an execution all the same, for the keys that it derives."""
        try:
            found = await self._key_if_any(values)
        except Exception as error:  # noqa: BLE001 - whatever the scope function raises
            await self._answers.refuse(error)
            return
        call = self._gate.calls.bypassed(lambda _plan: found)
        await call.begin()
        await self._run_begun(call, RequestBody(self._receive))

    async def _key_if_any(self, values: list[bytes]) -> CallKey:
        try:
            key = parse_key(values, strict=self._options.strict)
            space = await self._space()
            return CallKey("") if space == "" else self._gate.lookup_key(key, space=space)
        except Exception as error:
            if answers.is_http_exception(error):  # it may be all that checks the caller
                raise
            return CallKey("")  # a request that is not made idempotent needs no key, so nothing is wrong with it

    async def run(self, values: list[bytes]) -> None:
        """Answer the request, or run the app: under a claim, or, for nobody we know, bypassed."""
        if not values:
            await self._answers.answer(answers.KEY_MISSING)
            return
        try:
            key = parse_key(values, strict=self._options.strict)
            space = await self._space()
        except MalformedKeyError as error:
            await self._answers.answer(answers.KEY_MALFORMED, because=str(error))
        except Exception as error:  # noqa: BLE001 - whatever the scope function raises
            await self._answers.refuse(error)
        else:
            if space != "":
                await self._run_keyed(key, space)
            elif self._options.required:
                await self._answers.answer(answers.CALLER_UNKNOWN)
            else:
                self._gate.note_unknown_caller()
                await self._app(self._scope, self._receive, self._send)

    async def _space(self) -> str | None:
        """Return whose key it is; None: everybody's; `""`: nobody's."""
        if self._options.scope is None:
            return None
        space = self._options.scope(self._scope)
        if inspect.isawaitable(space):
            space = await space
        if space is None:
            return ""
        if not isinstance(space, str):  # pyright: ignore[reportUnnecessaryIsInstance] - of whatever type it is
            raise IdempotencyUsageError("scope(request_scope) must return a string, or None for a request without one")
        return space

    async def _run_keyed(self, key: str, space: str | None) -> None:
        request = RequestBody(self._receive)
        try:
            payload_hash = await self._read(request)
        except BodyTooLargeError:
            await self._answers.answer(answers.BODY_TOO_LARGE)
        except ClientGoneError:  # half a request must not run, and middleware further out may insist on a response
            with contextlib.suppress(OSError):  # so do servers say that the client is gone
                await self._answers.answer(answers.BODY_INCOMPLETE)
        else:
            await self._run_named(self._gate.lookup_key(key, space=space, payload_hash=payload_hash), request)

    async def _read(self, request: RequestBody) -> str:
        """Read the body; return the hash of what must not change under the key."""
        hash_function = self._options.settings.hash_function
        fingerprint = Fingerprint(self._scope, hash_function)
        await request.read(self._scope, fingerprint, limit=self._options.max_request_bytes)
        if self._options.fingerprint is not None:
            parts = request_parts(self._scope, request.whole)
            chosen = self._chosen(self._options.fingerprint, parts)
            if chosen is not None:
                return chosen_digest(parts, chosen, hash_function)
        return fingerprint.hexdigest()

    def _chosen(self, fingerprint: FingerprintFunction, request: RequestParts) -> bytes | None:
        try:
            chosen = fingerprint(request)
        except Exception as error:  # noqa: BLE001 - whatever a function of the user's makes of what a client sent
            # No trace: it may show what is in the request.
            message = "fingerprint of %s raised %s; the default is used"
            logger.error(message, self._gate.function, type(error).__name__)  # noqa: TRY400
            return None
        if chosen is not None and not isinstance(chosen, bytes):  # pyright: ignore[reportUnnecessaryIsInstance] - of whatever type it is
            raise IdempotencyUsageError("fingerprint(request) must return bytes, or None for the default")
        return chosen

    async def _run_named(self, key: CallKey, request: RequestBody) -> None:
        served = _served.get()
        visit = (self._scope.setdefault(_REQUEST, object()), key)
        if visit in served:  # by a layer further out, with the same prefix
            await self._app(self._scope, request.receive, self._send)
            return
        token = _served.set((*served, visit))
        try:
            await self._run_once(key, request)
        finally:  # who is further out may try again with the same scope
            with contextlib.suppress(ValueError):  # closed from another context, where it never was set
                _served.reset(token)

    async def _run_once(self, key: CallKey, request: RequestBody) -> None:
        call = self._gate.calls.make(
            lambda plan: key if plan.config.note is None else key._replace(note=plan.note_of(self._scope))
        )
        try:
            await call.begin()
        except answers.REFUSED as error:
            if isinstance(error, IdempotencyPersistenceLayerError):
                logger.error("%s refuses a request: %s", self._gate.function, error)  # noqa: TRY400 - nothing of ours
            await self._answers.answer(answers.problem_of(error))
        except BaseException as error:
            await call.fail(error)  # of an observer, when the key was claimed already
            raise
        else:
            await self._run_begun(call, request)

    async def _run_begun(self, call: Call, request: RequestBody) -> None:
        if call.phase is Phase.REPLAYED:
            await self._answers.hand_out(call)
        elif call.phase is Phase.CLAIMED:
            await Exchange(call, request, self._send, self._answers, self._options).run(self._app, self._scope)
        else:
            execution = RequestExecution(call)
            with running(execution):
                await self._app(self._scope, request.receive, self._send)
