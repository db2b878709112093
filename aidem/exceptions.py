"""Every error of aidem, in one tree.

    IdempotencyError
    ├── IdempotencyUsageError                       aidem is used in a way that cannot work
    │   └── IdempotencyConfigError                  an option's value; also a ValueError
    ├── IdempotencyKeyError                         the payload holds no key, or cannot be one
    ├── IdempotencyValidationError                  the same key with another payload
    ├── IdempotencyAlreadyInProgressError           another execution of the key is running
    ├── IdempotencyInDoubtError                     the owner vanished; the effect is unknown
    ├── IdempotencyLeaseLostError                   the claim was taken over meanwhile
    ├── IdempotencyResultUnavailableError           it happened; the result is not stored
    ├── IdempotencySerializationError               a result does not become text, or back
    │   ├── IdempotencyModelTypeError               the model does not suit the serializer
    │   └── IdempotencyNoSerializationModelError    the serializer found no model
    └── IdempotencyPersistenceLayerError            the persistence layer failed
        ├── IdempotencyPersistenceConfigError       … by its settings: table, rights, file
        ├── IdempotencyPersistenceConnectionError   … unreachable: a retry may help
        ├── IdempotencyHeldByTransactionError       … a transaction holds the record
        └── IdempotencyInvalidStatusError           … a record's status is unknown

An error has its facts as attributes. Its message says what to do, and never shows a payload or a result.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from aidem._rules.record import DataRecord


class IdempotencyError(Exception):
    """The base class of all errors that aidem raises.

    All classes take the same arguments. Without `message`, the message is made from the other arguments, so that an
    error can be rebuilt from its `args`, as some task queues do.

    Attributes:
        key: The idempotency key; None: not known.
        record: The record that caused the error; None: there is none.
        retry_after_seconds: Time after which a retry makes sense; None: not known.
    """

    _template: ClassVar[str] = ""

    def __init__(
        self,
        message: str = "",
        *,
        key: str | None = None,
        record: DataRecord | None = None,
        retry_after_seconds: float | None = None,
        reason: str = "",
    ) -> None:
        if key is None and record is not None:
            key = record.idempotency_key
        super().__init__(message or self._template.format(key=key, reason=reason))
        self.key = key
        self.record = record
        self.retry_after_seconds = retry_after_seconds

    def __reduce__(self) -> tuple[Any, ...]:
        # A subclass may take other arguments than it hands on: the default (class and args) would not rebuild it.
        return (_restore, (type(self), self.args), self.__dict__)


def _restore(cls: type[IdempotencyError], args: tuple[Any, ...]) -> IdempotencyError:
    return cls.__new__(cls, *args)


class IdempotencyUsageError(IdempotencyError):
    """aidem is used in a way that cannot work; the message says what to write instead."""


class IdempotencyConfigError(IdempotencyUsageError, ValueError):
    """An option has a value that cannot work; the message names the option and the allowed values."""


class IdempotencyKeyError(IdempotencyError):
    """The payload holds no idempotency key, or a value that cannot be one. Nothing was stored, and nothing has run."""


class IdempotencyValidationError(IdempotencyError):
    """The key was used before with a payload whose validated part differs. The function did not run."""

    _template = (
        "Payload does not match stored record for this event key: {key!r}; "
        "repeat the original payload, or use a new key"
    )


class IdempotencyAlreadyInProgressError(IdempotencyError):
    """Another execution of this key is running and did not end within `wait_timeout_seconds`."""

    _template = (
        "Execution already in progress with idempotency key: {key!r}; "
        "retry later, or set wait_timeout_seconds to wait for its result"
    )


class IdempotencyInDoubtError(IdempotencyError):
    """The owner of the claim vanished, and nobody knows whether its effect happened: the function did not run.

    So it is under `on_abandoned="raise"`, and where a check has not found out; what the check raised is the cause. The
    record is the claim as it is stored now. The page "Keys in doubt" of the documentation says what to do.
    """

    key: str  # pyright: ignore[reportIncompatibleVariableOverride] - always there
    record: DataRecord  # pyright: ignore[reportIncompatibleVariableOverride] - always there

    _template = (
        "the execution with idempotency key {key!r} was abandoned and its effect may have "
        "happened; find out, then use `aidem resolve KEY --result JSON` or `aidem release KEY`, or from code: "
        "aidem.operations.resolve(...) records its result, release(error.record) on the persistence layer lets it run "
        "again"
    )


class IdempotencyLeaseLostError(IdempotencyError):
    """Another caller took the claim over while the function ran, and the outcome of that caller is not known."""

    _template = (
        "the claim of idempotency key {key!r} was lost: {reason}; the function's effect may have happened, "
        "its result does not count"
    )


class IdempotencyResultUnavailableError(IdempotencyError):
    """The function ran once and does not run again; its result cannot be replayed."""

    _template = "the execution with idempotency key {key!r} is done, but its outcome cannot be replayed: {reason}"


class IdempotencySerializationError(IdempotencyError):
    """A result cannot be turned into text that the layer can store, or stored text cannot be turned into a result."""


class IdempotencyModelTypeError(IdempotencySerializationError):
    """The model type does not suit the serializer."""


class IdempotencyNoSerializationModelError(IdempotencySerializationError):
    """The serializer takes its model from the return annotation, and the function has none."""


class IdempotencyPersistenceLayerError(IdempotencyError):
    """The persistence layer failed; the message says whether the function has run.

    Attributes:
        may_be_applied: Whether the store may have applied the operation. Default: True. A layer sets it to False if the
            store cannot have applied it, for example because no connection could be made.
    """

    may_be_applied: bool = True


class IdempotencyPersistenceConfigError(IdempotencyPersistenceLayerError):
    """The settings of the persistence layer cannot work: table, schema, access rights, file."""

    may_be_applied = False


class IdempotencyPersistenceConnectionError(IdempotencyPersistenceLayerError):
    """The store could not be reached, did not answer in time, or asked to slow down."""


class IdempotencyHeldByTransactionError(IdempotencyPersistenceLayerError):
    """An open transaction holds the record, so that nobody can change it, or take its claim over, until that ends.

    Layers that support completion in the caller's transaction raise it from `renew` and `release`.
    """

    may_be_applied = False


class IdempotencyInvalidStatusError(IdempotencyPersistenceLayerError):
    """A stored record has a status that aidem does not know."""


class IdempotencyWarning(UserWarning):
    """A call runs without idempotency, or its result cannot be replayed."""
