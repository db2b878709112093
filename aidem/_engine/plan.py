"""The plan that all calls of one function share, the way from payloads to keys, and the one factory of calls.

A front finds the payload among its arguments, the plan makes the key from it, and the factory makes the call.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import warnings
from typing import TYPE_CHECKING, Any, ClassVar, Final, NamedTuple, TypeVarTuple

from aidem._checks import kind_of, refused
from aidem._engine.call import Call
from aidem._engine.shared import shared_by
from aidem._rules import key as _key
from aidem._rules.lifecycle import LeaseTerms
from aidem._runtime.clock import wall_clock
from aidem.config import default_persistence_store, defaults, registered_lambda_context
from aidem.exceptions import IdempotencyKeyError, IdempotencyWarning
from aidem.persistence import SupportsTakeOver, SupportsWaitForChange
from aidem.serialization import check_returns, resolve

if TYPE_CHECKING:
    from collections.abc import Callable

    from aidem._rules.abandoned import Check
    from aidem.config import IdempotencyConfig
    from aidem.persistence import PersistenceLayer
    from aidem.serialization import ModelSerializer, OutputSerializer

    FindPayload = Callable[[tuple[Any, ...], dict[str, Any]], Any]

Ts = TypeVarTuple("Ts")

SWITCHES: Final = ("AIDEM_IDEMPOTENCY_DISABLED", "POWERTOOLS_IDEMPOTENCY_DISABLED")
TRUE: Final = ("true", "1", "t", "yes", "y", "on")
FALSE: Final = ("", "false", "0", "f", "no", "n", "off")
_AIDEM, _POWERTOOLS = map(getattr(os.environ, "encodekey", str), SWITCHES)

logger = logging.getLogger("aidem")

MAX_NOTE_CHARACTERS: Final = 256
MINIMUM_LAMBDA_LEASE_SECONDS: Final = 1.0


class CallKey(NamedTuple):
    """What names a call, fixed when it starts.

    Attributes:
        text: The idempotency key; `""`: there is none, and the call runs without idempotency.
        payload_hash: Hash of the validated part of the payload; `""`: not validated.
        note: What the config's `note` made of the payload.
        payload: The payload, where a check may ask for it; else None.
    """

    text: str
    payload_hash: str = ""
    note: str | None = None
    payload: Any = None


class Arguments(dict[str, Any]):
    """A payload that is all arguments of a call by name; without an expression it always is a key."""

    __slots__ = ()


class Plan:
    """Layer, config, serializer and key prefix of one function or block, and what the process shares per layer."""

    __slots__ = (
        "_lease_and_renews",
        "_output_serializer",
        "check",
        "clock",
        "config",
        "function",
        "layer",
        "prefix",
        "serializer",
        "shared",
        "waits_for_change",
    )

    def __init__(
        self,
        *,
        layer: PersistenceLayer,
        config: IdempotencyConfig,
        function: str,
        prefix: str,
        output_serializer: type[ModelSerializer] | OutputSerializer | None = None,
        returns: Callable[..., Any] | None = None,
    ) -> None:
        self.layer = layer
        self.config = config
        self.function = function
        self.prefix = prefix
        self.clock: Callable[[], float] = getattr(layer, "clock", wall_clock)
        self.check: Check | None = config.on_abandoned if callable(config.on_abandoned) else None
        if self.check is not None and not isinstance(layer, SupportsTakeOver):
            allowed = "a layer with take_over() if on_abandoned is a check, see aidem.persistence.SupportsTakeOver"
            raise refused("persistence_store", kind_of(layer), allowed)
        self.shared = shared_by(layer)
        renews = config.renew_lease and config.lease_seconds is not None
        self._lease_and_renews = self._lease_of(config.lease_seconds), renews
        self.waits_for_change = layer if isinstance(layer, SupportsWaitForChange) else None
        self._output_serializer = output_serializer
        self.serializer = resolve(output_serializer, returns)

    def serializer_for(self, function: Callable[..., Any]) -> OutputSerializer:
        """Return the serializer for what a function returns, unless one is given."""
        return self.serializer if self._output_serializer is not None else resolve(None, function)

    def key_of_call(self, find_payload: FindPayload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> CallKey:
        """Return the key of a call with these arguments."""
        return self.key(find_payload(args, kwargs))

    def key(self, payload: Any) -> CallKey:
        """Return the key that a payload makes: what the expression selects of it, or all of it.

        Raises:
            IdempotencyKeyError: There is no key and the config demands one, or the payload cannot be one.
        """
        expression = self.config.event_key_jmespath
        are_arguments = isinstance(payload, Arguments)
        prepared: Any = _key.prepare_each(payload) if are_arguments else _key.prepare(payload)
        selected = _select(expression, prepared, self.config) if expression else prepared
        if (expression or not are_arguments) and _key.is_missing(selected):
            return self._missing()
        validated = self.config.payload_validation_jmespath
        payload_hash = self._hash_of(prepared, validated) if validated else ""
        return self._key_of(selected, payload_hash, payload=payload)

    def note_of(self, payload: Any) -> str | None:
        """Return the note that a claim for a payload carries: nothing that goes wrong with it stops a call."""
        if self.config.note is None:
            return None
        try:
            note: Any = self.config.note(payload)
        except Exception as error:  # noqa: BLE001 - whatever a function of the user's makes of the payload
            # No trace: it may show what is in the payload.
            logger.error("note of %s raised %s; the claim has none", self.function, type(error).__name__)  # noqa: TRY400
            return None
        if not (note is None or isinstance(note, str)):
            logger.error("note of %s returned no string but %s; the claim has none", self.function, type(note).__name__)
            return None
        return note[:MAX_NOTE_CHARACTERS].encode(errors="replace").decode() if note else None

    def key_of_block(self, key: Any, payload: Any) -> CallKey:
        """Return the key of a block; its payload, unless it is `...`, must not change under the key."""
        selected = _key.prepare(key)
        if _key.is_missing(selected):
            return self._missing()
        if payload is ...:
            return self._key_of(selected, payload=key)
        payload_hash = self._hash_of(_key.prepare(payload), self.config.payload_validation_jmespath)
        return self._key_of(selected, payload_hash, payload=payload)

    def _key_of(self, selected: Any, payload_hash: str = "", *, payload: Any) -> CallKey:
        config = self.config
        text = _key.key_of(selected, prefix=self.prefix, hash_function=config.hash_function)
        note = None if config.note is None else self.note_of(payload)
        return CallKey(text, payload_hash, note, None if self.check is None else payload)

    def _hash_of(self, prepared: Any, expression: str) -> str:
        return _key.payload_digest(_select(expression, prepared, self.config), self.config.hash_function)

    def _missing(self) -> CallKey:
        expression = self.config.event_key_jmespath
        where = f" by event_key_jmespath={expression!r}" if expression else ""
        message = f"no idempotency key was found{where} for {self.function}"
        if self.config.raise_on_no_idempotency_key:
            raise IdempotencyKeyError(f"{message}; send one, or set raise_on_no_idempotency_key=False")
        warnings.warn(f"{message}; it runs without idempotency", IdempotencyWarning, stacklevel=2)
        return CallKey("")

    def lease(self) -> tuple[LeaseTerms, bool]:
        """Return how long a claim made now holds, and whether it is renewed."""
        context = registered_lambda_context.get()
        if context is None:  # as `current_lambda_context` does, for less
            context = self.config.lambda_context
        if context is None:
            return self._lease_and_renews
        remaining = context.get_remaining_time_in_millis() / 1000
        return self._lease_of(max(remaining, MINIMUM_LAMBDA_LEASE_SECONDS)), False

    def _lease_of(self, lease_seconds: float | None) -> LeaseTerms:
        config = self.config
        may_be_taken_over = config.on_abandoned == "run_again"
        return LeaseTerms(
            expires_after_seconds=config.expires_after_seconds if may_be_taken_over else config.doubt_kept_seconds,
            lease_seconds=lease_seconds,
            may_be_taken_over=may_be_taken_over,
            max_clock_skew_seconds=config.max_clock_skew_seconds,
        )


def _select(expression: str, prepared: Any, config: IdempotencyConfig) -> Any:
    if not expression:
        return prepared
    from aidem._rules.expressions import compile_expression, search  # jmespath is imported where it is used

    return search(
        compile_expression(expression),
        prepared,
        config.jmespath_options,
        max_inflated_bytes=config.max_inflated_bytes,
    )


class CallFactory:
    """Makes the calls of one function, block or HTTP layer, from one plan as long as its layer and settings stay.

    Attributes:
        function: What messages and events call it.
    """

    call_type: ClassVar[type[Call]] = Call

    __slots__ = ("_config", "_layer", "_output_serializer", "_planned", "_prefix", "_returns", "function")

    def __init__(
        self,
        *,
        function: str,
        prefix: Callable[[], str],
        layer: PersistenceLayer | None,
        config: IdempotencyConfig | None,
        output_serializer: type[ModelSerializer] | OutputSerializer | None = None,
        returns: Callable[..., Any] | None = None,
    ) -> None:
        self.function = function
        self._prefix = prefix
        self._layer = layer
        self._config = config
        self._output_serializer = output_serializer
        self._returns = returns
        self._planned: tuple[PersistenceLayer, IdempotencyConfig, Plan] | None = None  # and for what it was made
        if returns is not None and output_serializer is None:
            check_returns(returns)

    @staticmethod
    def settled(config: IdempotencyConfig) -> IdempotencyConfig:
        """Return the settings that calls have in place of those that are configured."""
        return config

    def make(self, find_key: Callable[[Plan, *Ts], CallKey], *args: *Ts) -> Call:
        """Return a call, bypassed while a switch is on; its key is what `find_key` returns now.

        Raises:
            IdempotencyConfigError: The switch is neither true nor false.
            IdempotencyKeyError: There is no key and the config demands one, or the payload cannot be one.
        """
        if is_bypassed(self.function):
            return self.bypassed(find_key, *args)
        layer = default_persistence_store() if self._layer is None else self._layer
        config, planned = self._config or defaults.config, self._planned
        if planned is None or planned[0] is not layer or planned[1] is not config:
            made = Plan(
                layer=layer,
                config=self.settled(config),
                function=self.function,
                prefix=self._prefix_now(),
                output_serializer=self._output_serializer,
                returns=self._returns,
            )
            planned = self._planned = layer, config, made  # at once, as other threads read it
        plan = planned[2]
        return self.call_type(plan, find_key(plan, *args))

    def bypassed(self, find_key: Callable[[Plan, *Ts], CallKey], *args: *Ts) -> Call:
        """Return a call that asks no layer; its key is only there for `key_for`, if there is one."""
        plan = self._plan_without_layer()
        try:
            key = find_key(plan, *args)
        except Exception:  # noqa: BLE001 - a call that is not made idempotent needs no key, so nothing is wrong with it
            key = CallKey("")
        return self.call_type(plan, key, bypassed=True)

    def key_now(
        self,
        find_key: Callable[[Plan, tuple[Any, ...], dict[str, Any]], CallKey],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> str:
        """Return the key that a call would have now; no layer is asked for, and the prefix is not fixed.

        Raises:
            IdempotencyKeyError: There is none, or the payload cannot be one.
        """
        return find_key(self._plan_without_layer(), args, kwargs).text

    def _plan_without_layer(self) -> Plan:
        """Return a plan that makes keys and nothing else; a missing key is an error, and notes are not made."""
        from aidem.persistence.memory import MemoryPersistenceLayer  # few processes need it

        config = self.settled(self._config or defaults.config)
        config = dataclasses.replace(config, raise_on_no_idempotency_key=True, note=None)
        return Plan(layer=MemoryPersistenceLayer(), config=config, function=self.function, prefix=self._prefix_now())

    def _prefix_now(self) -> str:
        """Return the key prefix, which the first call fixes."""
        return self._prefix() if self._planned is None else self._planned[2].prefix


def is_bypassed(function: str) -> bool:
    """Whether a switch for tests bypasses all calls for now; then warn.

    Raises:
        IdempotencyConfigError: The switch is neither true nor false.
    """
    names = getattr(os.environ, "_data", None)  # asking os.environ itself takes a microsecond for each name
    if names is not None and _AIDEM not in names and _POWERTOOLS not in names:
        return False
    for switch in SWITCHES:
        value = os.environ.get(switch, "")
        text = value.strip().lower()
        if text in TRUE:
            warnings.warn(
                f"{switch} is set: {function} runs without idempotency; never set it in production",
                IdempotencyWarning,
                stacklevel=2,
            )
            return True
        if text not in FALSE:
            allowed = f"one of {', '.join(TRUE)} to turn idempotency off, or {', '.join(FALSE[1:])}"
            raise refused(switch, repr(value), allowed)
    return False
