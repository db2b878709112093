"""Settings: `IdempotencyConfig`, the defaults of the process, and the Lambda context of the current task."""

from __future__ import annotations

import contextlib
import logging
import os
from contextvars import ContextVar
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Final, Protocol, runtime_checkable

from aidem._checks import check_options, check_settings, kind_of, refused
from aidem._runtime.fork import ForkSafeLock
from aidem.exceptions import IdempotencyPersistenceConfigError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping
    from contextvars import Token

    from aidem._checks import OnAbandoned, OnPersistenceError
    from aidem._rules.record import DataRecord
    from aidem.hooks import IdempotencyHook
    from aidem.persistence import PersistenceLayer

    ResponseHook = Callable[[Any, DataRecord], Any | Awaitable[Any]]

logger = logging.getLogger("aidem")

DEFAULT_PATH: Final = "aidem.sqlite3"


@runtime_checkable
class LambdaContext(Protocol):
    """The part of AWS Lambda's context object that aidem reads."""

    def get_remaining_time_in_millis(self) -> int:
        """Return the time until Lambda ends the invocation, in milliseconds."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class IdempotencyConfig:
    """How calls are made idempotent: frozen, hashable, safe to share between any number of functions.

    Attributes:
        event_key_jmespath: JMESPath that selects the key from the payload; empty: all of it.
        payload_validation_jmespath: JMESPath for the part that must not change under one key; empty: not validated.
        jmespath_options: Keyword arguments of `jmespath.Options`; they replace the built-in functions.
        max_inflated_bytes: To how many bytes `powertools_base64_gzip` may inflate in one evaluation of an expression,
            all its calls together. A payload beyond it is refused.
        raise_on_no_idempotency_key: Whether a missing key is an error instead of a call without idempotency.
        expires_after_seconds: How long an outcome is kept, counted from completion.
        use_local_cache: Whether completed records are also kept in memory.
        local_cache_max_items: How many of them.
        hash_function: Any fixed-length name of `hashlib`; `"md5"` to share records with AWS Powertools.
        response_hook: `hook(response, record)`, sync or async, on every replay; its return value is returned.
        lambda_context: A Lambda context for every call, unless one is registered for the task.
        lease_seconds: How long a claim holds without being renewed; None: until the record expires.
        renew_lease: Whether the lease is renewed, at a third of it, while the function runs.
        wait_timeout_seconds: How long to wait for a running execution.
        on_abandoned: What a new call does when the owner of a claim vanished: `"run_again"` (at least once) or
            `"raise"` `IdempotencyInDoubtError` (at most once within the window).
        on_persistence_error: What a call does when the store cannot be reached: `"raise"`, or `"run"` unprotected.
        stored_exceptions: Exception types whose occurrence is a result: stored, and raised again on a replay.
        max_clock_skew_seconds: Added to a foreign lease before it may be taken over, where clients' clocks judge.
        hooks: Observers of what happens to calls.
        note: `note(payload)`, not async, on every call: text for operators, such as an order number, which is stored in
            clear beside the claim and the outcome. What is longer than 256 characters is cut off. Never a secret.

    Raises:
        IdempotencyConfigError: An option has a value that cannot work; the message names it and what is allowed.
    """

    event_key_jmespath: str = ""
    payload_validation_jmespath: str = ""
    jmespath_options: Mapping[str, Any] | None = field(default=None, hash=False)
    max_inflated_bytes: int = 4 * 1024**2
    raise_on_no_idempotency_key: bool = False
    expires_after_seconds: float = 3600
    use_local_cache: bool = False
    local_cache_max_items: int = 256
    hash_function: str = "sha256"
    response_hook: ResponseHook | None = field(default=None, hash=False)
    lambda_context: LambdaContext | None = field(default=None, hash=False)
    lease_seconds: float | None = 30.0
    renew_lease: bool = True
    wait_timeout_seconds: float = 0.0
    on_abandoned: OnAbandoned = "run_again"
    on_persistence_error: OnPersistenceError = "raise"
    stored_exceptions: tuple[type[Exception], ...] = ()
    max_clock_skew_seconds: float = 0.0
    hooks: tuple[IdempotencyHook, ...] = field(default=(), hash=False)
    note: Callable[[Any], str | None] | None = field(default=None, hash=False)

    def __post_init__(self) -> None:
        check_settings({each.name: getattr(self, each.name) for each in fields(self)})

    def register_lambda_context(self, lambda_context: LambdaContext) -> None:
        """Register the Lambda context for the current task or thread, as `aidem.register_lambda_context` does."""
        register_lambda_context(lambda_context)


# --- The Lambda context of the current task or thread ---------------------------------------------------------------

registered_lambda_context: Final[ContextVar[LambdaContext | None]] = ContextVar("aidem_lambda_context", default=None)


def register_lambda_context(lambda_context: LambdaContext | None) -> Token[LambdaContext | None]:
    """Let claims made by the current task or thread last as long as its Lambda invocation.

    Args:
        lambda_context: Lambda's context object; None: forget the one registered before.

    Returns:
        A token for `aidem.config.reset_lambda_context`.

    Raises:
        IdempotencyConfigError: It is no Lambda context.
    """
    check_options(lambda_context=lambda_context)
    return registered_lambda_context.set(lambda_context)


def reset_lambda_context(token: Token[LambdaContext | None]) -> None:
    """Restore what was registered before."""
    # A coroutine that is closed from another context never changed the variable there.
    with contextlib.suppress(ValueError):
        registered_lambda_context.reset(token)


def current_lambda_context(config: IdempotencyConfig) -> LambdaContext | None:
    """Return the context registered for the current task or thread, else that of the config."""
    context = registered_lambda_context.get()
    return config.lambda_context if context is None else context


def lambda_context_of(context: object) -> tuple[LambdaContext | None, bool]:
    """Return the Lambda context in a handler's second argument, and whether a durable function replays.

    A durable context carries the real one in `lambda_context`; once it has recorded more than its first operation, the
    handler runs again over what it did before.
    """
    state, inner = getattr(context, "state", None), getattr(context, "lambda_context", None)
    if state is not None and inner is not None:
        operations = getattr(state, "operations", ())
        return (inner if isinstance(inner, LambdaContext) else None), len(operations) > 1
    return (context if isinstance(context, LambdaContext) else None), False


# --- The defaults of the process ------------------------------------------------------------------------------------


@dataclass(slots=True)
class Defaults:
    """What `configure` has set."""

    persistence_store: PersistenceLayer | None = None
    config: IdempotencyConfig = field(default_factory=IdempotencyConfig)
    from_environment: tuple[str, PersistenceLayer] | None = None


defaults: Final = Defaults()
_opening = ForkSafeLock()


def configure(*, persistence_store: PersistenceLayer | None = None, config: IdempotencyConfig | None = None) -> None:
    """Set the process-wide defaults, both of them; what is left out goes back to aidem's own default.

    Raises:
        IdempotencyConfigError: A value is no layer, or no config.
    """
    check_call_options(config=config, persistence_store=persistence_store)
    defaults.persistence_store = persistence_store
    defaults.config = config or IdempotencyConfig()


def check_call_options(*, config: object, **options: object) -> None:
    """Check options of decorators, blocks and `configure`, by name.

    Raises:
        IdempotencyConfigError: One has a value that cannot work.
    """
    if not (config is None or isinstance(config, IdempotencyConfig)):
        raise refused("config", kind_of(config), "an IdempotencyConfig(...)")
    check_options(**options)


def default_config() -> IdempotencyConfig:
    """Return the config for calls that have none of their own."""
    return defaults.config


def default_persistence_store() -> PersistenceLayer:
    """Return the layer for calls that have none of their own.

    It is the one given to `configure`, else the one that the environment variable `AIDEM_PERSISTENCE` names, else
    SQLite in `aidem.sqlite3` in the working directory.

    Raises:
        IdempotencyPersistenceConfigError: Nothing is configured on Lambda, where a file is shared with nobody; or
            the environment variable cannot be understood.
    """
    if defaults.persistence_store is not None:
        return defaults.persistence_store
    url = os.environ.get("AIDEM_PERSISTENCE", "")
    opened = defaults.from_environment
    if opened is None or opened[0] != url:
        opened = _open_once(url)
    return opened[1]


def _open_once(url: str) -> tuple[str, PersistenceLayer]:
    with _opening.lock:  # two threads with a layer each would not see each other's records, where those are in memory
        opened = defaults.from_environment
        if opened is None or opened[0] != url:
            opened = defaults.from_environment = (url, _open(url))
        return opened


def _open(url: str) -> PersistenceLayer:
    from aidem.persistence import open_persistence_layer  # loads the layer's client only now

    if url:
        return open_persistence_layer(url)
    if os.environ.get("AWS_LAMBDA_FUNCTION_NAME"):
        message = (
            "no persistence layer is configured, and on Lambda a file would be shared with nobody; pass "
            "persistence_store=DynamoDBPersistenceLayer(...) or call aidem.configure(persistence_store=...)"
        )
        raise IdempotencyPersistenceConfigError(message)
    path = os.path.abspath(DEFAULT_PATH)  # noqa: PTH100 - pathlib costs more to import than all the rest of this module
    logger.warning("no persistence layer is configured; idempotency records are kept in %s", path)
    return open_persistence_layer(f"sqlite:///{path}")
