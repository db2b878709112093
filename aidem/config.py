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
    from aidem._rules.abandoned import Check
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
    """The settings of idempotent functions: frozen and hashable, so any number of functions can share a config.

    Attributes:
        event_key_jmespath: JMESPath expression that selects the key from the payload. Default: `""`, all of the
            payload.
        payload_validation_jmespath: JMESPath expression that selects the part of the payload that must not change under
            one key. Default: `""`, the payload is not validated.
        jmespath_options: Keyword arguments of `jmespath.Options`; they replace the built-in functions. Default: None.
        max_inflated_bytes: Maximum size in bytes of all text that `powertools_base64_gzip` inflates in one evaluation
            of an expression; a larger payload raises `IdempotencyKeyError`. Default: 4 MiB.
        raise_on_no_idempotency_key: Whether a call without a key raises `IdempotencyKeyError`. Default: False, it runs
            without idempotency and emits an `IdempotencyWarning`.
        expires_after_seconds: Time for which an outcome is kept, counted from completion. Default: 3600.
        use_local_cache: Whether completed records are also kept in memory. Default: False.
        local_cache_max_items: Maximum number of records in that cache. Default: 256.
        hash_function: Any name in `hashlib` whose digests have a fixed length; `"md5"` shares records with AWS
            Powertools. Default: `"sha256"`.
        response_hook: A function `hook(response, record)`, sync or async, that is called on every replay and returns
            the value for the caller. Default: None.
        lambda_context: A Lambda context for every call, unless another one is registered for the task. Default: None.
        lease_seconds: Time for which a claim holds without being renewed; None: until the record expires. Default: 30.
        renew_lease: Whether the lease is renewed while the function runs, each time a third of it has passed. Default:
            True.
        wait_timeout_seconds: Time for which a call waits for the result of a running execution. Default: 0.
        on_abandoned: What a call does if the owner of a claim vanished: `"run_again"` runs the function (at least
            once), `"raise"` raises `IdempotencyInDoubtError` (at most once within `doubt_kept_seconds`). Or a check: a
            function `check(abandoned)`, async or plain, that gets an `AbandonedExecution`, finds out whether its effect
            happened, and returns `Happened(result)`, `DidNotHappen()` or `StillUnknown()`. Default: `"run_again"`.
        doubt_kept_seconds: Time for which a claim in doubt is kept, under `on_abandoned="raise"` or a check, counted
            from its last renewal; after that the function runs again. Default: 7 days.
        on_persistence_error: What a call does if the store cannot be reached before the function runs: `"raise"`, or
            `"run"` without idempotency. Default: `"raise"`.
        stored_exceptions: Exception types that are results: they are stored, and raised again on a replay. Default:
            `()`.
        max_clock_skew_seconds: Time that is added to the lease of another caller before its claim is taken over, by
            layers that use the clocks of their callers. Default: 0.
        hooks: Observers with a method `on_event(event)`. Default: `()`.
        note: A function `note(payload)`, not async, that is called on every call and returns text for operators, such
            as an order number. It is stored in clear beside the claim and the outcome; more than 256 characters are cut
            off. Never return a secret. Default: None.

    Raises:
        IdempotencyConfigError: An option has a value that cannot work; the message names the option and the allowed
            values.
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
    on_abandoned: OnAbandoned | Check = field(default="run_again", hash=False)
    doubt_kept_seconds: float = 7 * 86_400
    on_persistence_error: OnPersistenceError = "raise"
    stored_exceptions: tuple[type[Exception], ...] = ()
    max_clock_skew_seconds: float = 0.0
    hooks: tuple[IdempotencyHook, ...] = field(default=(), hash=False)
    note: Callable[[Any], str | None] | None = field(default=None, hash=False)

    def __post_init__(self) -> None:
        check_settings({each.name: getattr(self, each.name) for each in fields(self)})

    def register_lambda_context(self, lambda_context: LambdaContext) -> None:
        """Register the Lambda context for the current task or thread, as `aidem.register_lambda_context` does.

        Args:
            lambda_context: Lambda's context object.

        Raises:
            IdempotencyConfigError: It is not a Lambda context.
        """
        register_lambda_context(lambda_context)


# --- The Lambda context of the current task or thread ---------------------------------------------------------------

registered_lambda_context: Final[ContextVar[LambdaContext | None]] = ContextVar("aidem_lambda_context", default=None)


def register_lambda_context(lambda_context: LambdaContext | None) -> Token[LambdaContext | None]:
    """Let claims of the current task or thread last as long as its Lambda invocation.

    Args:
        lambda_context: Lambda's context object; None removes the one registered before.

    Returns:
        A token for `aidem.config.reset_lambda_context`.

    Raises:
        IdempotencyConfigError: It is not a Lambda context.
    """
    check_options(lambda_context=lambda_context)
    return registered_lambda_context.set(lambda_context)


def reset_lambda_context(token: Token[LambdaContext | None]) -> None:
    """Restore the Lambda context that was registered before.

    Args:
        token: The return value of `register_lambda_context`.
    """
    # A coroutine that is closed from another context never changed the variable there.
    with contextlib.suppress(ValueError):
        registered_lambda_context.reset(token)


def current_lambda_context(config: IdempotencyConfig) -> LambdaContext | None:
    """Return the context registered for the current task or thread, else that of the config."""
    context = registered_lambda_context.get()
    return config.lambda_context if context is None else context


def lambda_context_of(context: object) -> tuple[LambdaContext | None, bool]:
    """Return the Lambda context in a handler's second argument, and whether a durable function replays.

    A durable context has the Lambda context in `lambda_context`. If it has recorded more than its first operation, this
    invocation replays an earlier one.
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
    """Set the layer and the config for all functions and blocks that have none of their own.

    Both are set by each call, so an argument that is left out is reset to its default. It can be called after functions
    were decorated.

    Args:
        persistence_store: The layer. Default: the layer in the environment variable `AIDEM_PERSISTENCE`, otherwise
            SQLite in `aidem.sqlite3` in the working directory; on Lambda there is no default.
        config: The settings. Default: `IdempotencyConfig()`.

    Raises:
        IdempotencyConfigError: A value is not a persistence layer, or not an `IdempotencyConfig`.
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

    It is the layer of `configure`, otherwise the one in the environment variable `AIDEM_PERSISTENCE`, otherwise SQLite
    in `aidem.sqlite3` in the working directory.

    Raises:
        IdempotencyPersistenceConfigError: No layer is configured on Lambda, where a file is not shared with other
            instances; or the environment variable is not the URL of a layer.
    """
    if defaults.persistence_store is not None:
        return defaults.persistence_store
    url = os.environ.get("AIDEM_PERSISTENCE", "")
    opened = defaults.from_environment
    if opened is None or opened[0] != url:
        with _opening.lock:  # two threads with a layer each would not see each other's records in memory
            opened = defaults.from_environment
            if opened is None or opened[0] != url:
                opened = defaults.from_environment = (url, _open(url))
    return opened[1]


def _open(url: str) -> PersistenceLayer:
    from aidem.persistence import open_persistence_layer  # loads the layer's client only now

    if url:
        return open_persistence_layer(url)
    if os.environ.get("AWS_LAMBDA_FUNCTION_NAME"):
        message = (
            "no persistence layer is configured, and on Lambda a file is not shared with other instances; pass "
            "persistence_store=DynamoDBPersistenceLayer(...) or call aidem.configure(persistence_store=...)"
        )
        raise IdempotencyPersistenceConfigError(message)
    path = os.path.abspath(DEFAULT_PATH)  # noqa: PTH100 - pathlib costs more to import than all the rest of this module
    logger.warning("no persistence layer is configured; idempotency records are kept in %s", path)
    return open_persistence_layer(f"sqlite:///{path}")
