"""The one factory of calls, for decorators, blocks and HTTP; and the switches for tests, which bypass every call."""

from __future__ import annotations

import dataclasses
import os
import warnings
from typing import TYPE_CHECKING, Any, ClassVar, Concatenate, Final, ParamSpec

from aidem._checks import refused
from aidem._engine.call import Call
from aidem._engine.plan import CallKey, Plan
from aidem.config import default_config, default_persistence_store
from aidem.exceptions import IdempotencyWarning
from aidem.serialization import check_returns

if TYPE_CHECKING:
    from collections.abc import Callable

    from aidem._api.signature import FindPayload, Target
    from aidem.config import IdempotencyConfig
    from aidem.persistence import PersistenceLayer
    from aidem.serialization import ModelSerializer, OutputSerializer

P = ParamSpec("P")

SWITCHES: Final = ("AIDEM_IDEMPOTENCY_DISABLED", "POWERTOOLS_IDEMPOTENCY_DISABLED")
TRUE: Final = ("true", "1", "t", "yes", "y", "on")
FALSE: Final = ("", "false", "0", "f", "no", "n", "off")
_AIDEM, _POWERTOOLS = map(getattr(os.environ, "encodekey", str), SWITCHES)


class CallFactory:
    """Makes the calls of one function, block or HTTP layer; what is the same for all of them is made once.

    Attributes:
        function: What messages and events call it.
    """

    call_type: ClassVar[type[Call]] = Call

    __slots__ = ("_config", "_layer", "_output_serializer", "_plan", "_prefix", "_returns", "function")

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
        self._plan: Plan | None = None

    def config(self) -> IdempotencyConfig:
        """Return the settings of a call that starts now."""
        return self._config or default_config()

    def make(self, find_key: Callable[Concatenate[Plan, P], CallKey], *args: P.args, **kwargs: P.kwargs) -> Call:
        """Return a call, bypassed while a switch is on; its key is what `find_key` returns now.

        Raises:
            IdempotencyConfigError: The switch is neither true nor false.
            IdempotencyKeyError: There is no key and the config demands one, or the payload cannot be one.
        """
        if is_bypassed(self.function):
            return self.bypassed(find_key, *args, **kwargs)
        plan = self._planned()
        return self.call_type(plan, find_key(plan, *args, **kwargs))

    def bypassed(self, find_key: Callable[Concatenate[Plan, P], CallKey], *args: P.args, **kwargs: P.kwargs) -> Call:
        """Return a call that asks no layer; its key is only there for `key_for`, if there is one."""
        from aidem.persistence.memory import MemoryPersistenceLayer  # only needed while a switch for tests is on

        demanding = dataclasses.replace(self.config(), raise_on_no_idempotency_key=True)
        plan = Plan(layer=MemoryPersistenceLayer(), config=demanding, function=self.function, prefix=self._prefix())
        try:
            key = find_key(plan, *args, **kwargs)
        except Exception:  # noqa: BLE001 - a call that is not made idempotent needs no key, so nothing is wrong with it
            key = CallKey("")
        return self.call_type(plan, key, bypassed=True)

    def _planned(self) -> Plan:
        """Return the plan, for the layer and the settings of now."""
        layer = default_persistence_store() if self._layer is None else self._layer
        config = self.config()
        plan = self._plan
        if plan is None or plan.layer is not layer or plan.config is not config:
            plan = self._plan = Plan(
                layer=layer,
                config=config,
                function=self.function,
                prefix=self._prefix() if plan is None else plan.prefix,  # read at the first call
                output_serializer=self._output_serializer,
                returns=self._returns,
            )
        return plan


class Binding(CallFactory):
    """One decorated function with its options: makes the call of each invocation."""

    __slots__ = ("_find_payload",)

    def __init__(
        self,
        target: Target,
        find_payload: FindPayload,
        *,
        persistence_store: PersistenceLayer | None,
        config: IdempotencyConfig | None,
        key_prefix: str | None,
        output_serializer: type[ModelSerializer] | OutputSerializer | None = None,
    ) -> None:
        if output_serializer is None:
            check_returns(target.function)
        super().__init__(
            function=target.name,
            prefix=lambda: key_prefix or target.default_prefix(),
            layer=persistence_store,
            config=config,
            output_serializer=output_serializer,
            returns=target.function,
        )
        self._find_payload = find_payload

    def call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        """Return the call of one invocation; its key is fixed now."""
        return self.make(self._key, args, kwargs)

    def _key(self, plan: Plan, args: tuple[Any, ...], kwargs: dict[str, Any]) -> CallKey:
        return plan.key(self._find_payload(args, kwargs))


def is_bypassed(function: str) -> bool:
    """Whether a switch for tests bypasses all calls for now; then warn.

    Raises:
        IdempotencyConfigError: The switch is neither true nor false.
    """
    names = getattr(os.environ, "_data", None)  # asking os.environ itself takes a microsecond for each name
    if names is not None and _AIDEM not in names and _POWERTOOLS not in names:
        return False
    for switch in SWITCHES:
        value = os.environ.get(switch)
        if value and _is_true(switch, value):
            warnings.warn(
                f"{switch} is set: {function} runs without idempotency; never set it in production",
                IdempotencyWarning,
                stacklevel=2,
            )
            return True
    return False


def _is_true(switch: str, value: str) -> bool:
    text = value.strip().lower()
    if text in TRUE:
        return True
    if text in FALSE:
        return False
    raise refused(switch, repr(value), f"one of {', '.join(TRUE)} to turn idempotency off, or {', '.join(FALSE[1:])}")
