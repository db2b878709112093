"""The gate that every request comes to: it passes, is refused, gets a recorded response, or runs under a claim."""

from __future__ import annotations

import inspect
import logging
from typing import TYPE_CHECKING, Final

from aidem import _http_answers as answers
from aidem._engine import Call, Phase
from aidem._execution import Execution, running
from aidem._http_exchange import Exchange
from aidem._http_fingerprint import Fingerprint, lookup_key
from aidem._http_key import MalformedKeyError, parse_key
from aidem._http_request import BodyTooLargeError, ClientGoneError, RequestBody
from aidem._http_types import header_values
from aidem._plan import Key, Plan, is_disabled, unprotected_call
from aidem.config import default_persistence_store
from aidem.exceptions import IdempotencyError, IdempotencyPersistenceLayerError, IdempotencyUsageError

if TYPE_CHECKING:
    from aidem._http_options import HttpOptions
    from aidem._http_types import ASGIApp, Receive, Scope, Send

logger = logging.getLogger("aidem")

KEY_HEADER: Final = b"idempotency-key"
SERVED: Final = "aidem.key"
"""Where the scope of a request says under which keys it is being served."""


class Gate:
    """Serves the requests of one app or route; it holds nothing of any of them.

    Attributes:
        options: What it was told.
    """

    __slots__ = ("_function", "_plan", "options")

    def __init__(self, options: HttpOptions) -> None:
        self.options = options
        self._function = f"the HTTP layer {options.key_prefix!r}"
        self._plan: Plan | None = None

    async def serve(self, app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request; whatever is none, or has no key, goes to the app as it is."""
        is_concerned = scope["type"] == "http" and scope["method"].upper() in self.options.methods
        values = header_values(scope["headers"], KEY_HEADER) if is_concerned else []
        if not (is_concerned and (values or self.options.required)):
            await app(scope, receive, send)
        elif is_disabled(self._function):
            await self._serve_switched_off(values, app, scope, receive, send)
        elif not values:
            await self._answer(send, answers.KEY_MISSING)
        else:
            await self._serve_with_key(values, app, scope, receive, send)

    async def _serve_switched_off(
        self, values: list[bytes], app: ASGIApp, scope: Scope, receive: Receive, send: Send
    ) -> None:
        """Run the app unprotected; its handlers have an execution all the same, for the keys that it derives."""
        found = await self._key_if_any(values, scope)
        plan, key = unprotected_call(
            lambda _: found, config=self.options.settings, function=self._function, prefix=self.options.key_prefix
        )
        call = Call(plan, key, bypassed=True)
        await call.begin()
        await self._serve_begun(call, app, scope, RequestBody(receive), send)

    async def _key_if_any(self, values: list[bytes], scope: Scope) -> Key:
        try:
            key = parse_key(values, strict=self.options.strict)
            space = await self._space_of(scope)
            return Key("") if space == "" else self._lookup_key(key, space=space)
        except Exception:  # noqa: BLE001 - a request that is not made idempotent needs no key, so nothing is wrong with it
            return Key("")

    def _lookup_key(self, key: str, *, space: str | None, payload_hash: str = "") -> Key:
        hash_function = self.options.settings.hash_function
        return Key(lookup_key(self.options.key_prefix, space=space, key=key, hash_function=hash_function), payload_hash)

    async def _serve_with_key(
        self, values: list[bytes], app: ASGIApp, scope: Scope, receive: Receive, send: Send
    ) -> None:
        try:
            key = parse_key(values, strict=self.options.strict)
        except MalformedKeyError as error:
            await self._answer(send, answers.KEY_MALFORMED, because=str(error))
            return
        space = await self._space_of(scope)
        if space == "":
            await app(scope, receive, send)
            return
        request = RequestBody(receive)
        try:
            named = await self._read(request, scope, space=space, key=key)
        except BodyTooLargeError:
            await self._answer(send, answers.BODY_TOO_LARGE)
        except ClientGoneError:
            pass  # nobody waits for an answer, and half a request must not run
        else:
            await self._serve_named(named, app, scope, request, send)

    async def _read(self, request: RequestBody, scope: Scope, *, space: str | None, key: str) -> Key:
        """Read the body; return what names the request."""
        fingerprint = Fingerprint(scope, self.options.settings.hash_function)
        await request.read(scope, fingerprint, limit=self.options.max_request_bytes)
        return self._lookup_key(key, space=space, payload_hash=fingerprint.hexdigest())

    async def _serve_named(self, key: Key, app: ASGIApp, scope: Scope, request: RequestBody, send: Send) -> None:
        served = scope.get(SERVED, ())
        if key in served:  # by a layer further out, with the same prefix
            await app(scope, request.receive, send)
            return
        scope[SERVED] = (*served, key)
        try:
            await self._serve_once(key, app, scope, request, send)
        finally:
            scope[SERVED] = served  # who is further out may try again with it

    async def _serve_once(self, key: Key, app: ASGIApp, scope: Scope, request: RequestBody, send: Send) -> None:
        call = Call(self._current_plan(), key)
        try:
            await call.begin()
        except answers.REFUSED as error:
            await self._refuse(send, error)
        except BaseException as error:
            await call.fail(error)  # of an observer, when the key was claimed already
            raise
        else:
            await self._serve_begun(call, app, scope, request, send)

    async def _serve_begun(self, call: Call, app: ASGIApp, scope: Scope, request: RequestBody, send: Send) -> None:
        if call.phase is Phase.REPLAYED:
            await answers.hand_out(call, send, documentation_url=self.options.documentation_url)
        elif call.phase is Phase.CLAIMED:
            await Exchange(call, request, send, self.options).run(app, scope)
        else:
            execution = Execution(call)
            with running(execution):
                await app(scope, request.receive, send)

    async def _space_of(self, scope: Scope) -> str | None:
        """Return whose key it is; None: everybody's; `""`: nobody's, so that the request passes."""
        if self.options.scope is None:
            return None
        space = self.options.scope(scope)
        if inspect.isawaitable(space):
            space = await space
        if space is None:
            return ""
        if not isinstance(space, str):  # pyright: ignore[reportUnnecessaryIsInstance] - of whatever type it is
            raise IdempotencyUsageError("scope(request_scope) must return a string, or None for a request without one")
        return space

    def _current_plan(self) -> Plan:
        plan, layer = self._plan, self.options.persistence_store
        if layer is None:
            layer = default_persistence_store()
        if plan is None or plan.layer is not layer:
            options = self.options
            plan = Plan(layer=layer, config=options.settings, function=self._function, prefix=options.key_prefix)
            self._plan = plan
        return plan

    async def _refuse(self, send: Send, error: IdempotencyError) -> None:
        if isinstance(error, IdempotencyPersistenceLayerError):
            logger.error("%s refuses a request: %s", self._function, error)
        await self._answer(send, answers.problem_of(error))

    async def _answer(self, send: Send, problem: answers.Problem, *, because: str = "") -> None:
        await answers.answer(send, problem, documentation_url=self.options.documentation_url, because=because)
