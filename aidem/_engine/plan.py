"""The plan: what is the same for every call of one function, fixed once; and how a payload becomes a call's key."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from aidem._engine.shared import shared_by
from aidem._rules import key as _key
from aidem._rules.lifecycle import LeaseTerms
from aidem._runtime.clock import wall_clock
from aidem.config import current_lambda_context
from aidem.exceptions import IdempotencyKeyError, IdempotencyWarning
from aidem.persistence import SupportsWaitForChange
from aidem.serialization import resolve

if TYPE_CHECKING:
    from collections.abc import Callable

    from aidem.config import IdempotencyConfig
    from aidem.persistence import PersistenceLayer
    from aidem.serialization import ModelSerializer, OutputSerializer

MINIMUM_LAMBDA_LEASE_SECONDS: Final = 1.0


class CallKey(NamedTuple):
    """What names a call, fixed when it starts.

    Attributes:
        text: The idempotency key; `""`: there is none, and the call runs without idempotency.
        payload_hash: Hash of the validated part of the payload; `""`: not validated.
    """

    text: str
    payload_hash: str = ""


class Arguments(dict[str, Any]):
    """A payload that is all arguments of a call by name; without an expression it always is a key."""


class Plan:
    """Layer, config, serializer and key prefix of one function or block, and what the process shares per layer."""

    __slots__ = (
        "_lease",
        "_output_serializer",
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
        self.shared = shared_by(layer)
        self._lease = self._lease_of(config.lease_seconds)
        self.waits_for_change = layer if isinstance(layer, SupportsWaitForChange) else None
        self._output_serializer = output_serializer
        self.serializer = resolve(output_serializer, returns)

    def serializer_for(self, function: Callable[..., Any]) -> OutputSerializer:
        """Return the serializer for what a function returns, unless one is given."""
        return self.serializer if self._output_serializer is not None else resolve(None, function)

    def key(self, payload: Any) -> CallKey:
        """Return the key that a payload makes: what the expression selects of it, or all of it.

        Raises:
            IdempotencyKeyError: There is no key and the config demands one, or the payload cannot be one.
        """
        expression = self.config.event_key_jmespath
        are_arguments = isinstance(payload, Arguments)
        prepared: Any = (
            {name: _key.prepare(value) for name, value in payload.items()} if are_arguments else _key.prepare(payload)
        )
        selected = _select(expression, prepared, self.config) if expression else prepared
        if (expression or not are_arguments) and _key.is_missing(selected):
            return self._missing()
        return self.key_of(selected, self._validation_hash(prepared))

    def key_of(self, selected: Any, payload_hash: str = "") -> CallKey:
        """Return the key of a selected value, whatever it is."""
        digest = _key.payload_digest(selected, self.config.hash_function)
        return CallKey(_key.idempotency_key(self.prefix, digest), payload_hash)

    def key_of_block(self, key: Any, payload: Any) -> CallKey:
        """Return the key of a block; its payload, unless it is `...`, must not change under the key."""
        selected = _key.prepare(key)
        if _key.is_missing(selected):
            return self._missing()
        if payload is ...:
            return self.key_of(selected)
        prepared = _key.prepare(payload)
        validated = _select(self.config.payload_validation_jmespath, prepared, self.config)
        return self.key_of(selected, _key.payload_digest(validated, self.config.hash_function))

    def _validation_hash(self, prepared: Any) -> str:
        expression = self.config.payload_validation_jmespath
        if not expression:
            return ""
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
        context = current_lambda_context(self.config)
        if context is None:
            return self._lease, self.config.renew_lease and self.config.lease_seconds is not None
        remaining = context.get_remaining_time_in_millis() / 1000
        return self._lease_of(max(remaining, MINIMUM_LAMBDA_LEASE_SECONDS)), False

    def _lease_of(self, lease_seconds: float | None) -> LeaseTerms:
        return LeaseTerms(
            expires_after_seconds=self.config.expires_after_seconds,
            lease_seconds=lease_seconds,
            may_be_taken_over=self.config.on_abandoned == "run_again",
            max_clock_skew_seconds=self.config.max_clock_skew_seconds,
        )


def _select(expression: str, prepared: Any, config: IdempotencyConfig) -> Any:
    if not expression:
        return prepared
    from aidem._rules.expressions import compile_expression, search  # jmespath is imported only by those who use it

    return search(
        compile_expression(expression),
        prepared,
        config.jmespath_options,
        max_inflated_bytes=config.max_inflated_bytes,
    )
