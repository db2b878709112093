"""What DynamoDB and its client say when something fails, as errors of aidem that tell what to do."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, cast

from botocore.exceptions import (
    BotoCoreError,
    ConnectionError,  # noqa: A004 - botocore's name for all that keeps it from the endpoint
    CredentialRetrievalError,
    HTTPClientError,
    NoCredentialsError,
    NoRegionError,
    PartialCredentialsError,
    TokenRetrievalError,
)
from botocore.parsers import ResponseParserError

from aidem.exceptions import (
    IdempotencyError,
    IdempotencyPersistenceConfigError,
    IdempotencyPersistenceConnectionError,
    IdempotencyPersistenceLayerError,
    IdempotencySerializationError,
)

if TYPE_CHECKING:
    from collections.abc import Generator

CONDITION_FAILED: Final = "ConditionalCheckFailedException"
DENIED: Final = frozenset({"AccessDenied", "AccessDeniedException"})
THROTTLED: Final = frozenset(
    {
        "LimitExceededException",
        "ProvisionedThroughputExceededException",
        "RequestLimitExceeded",
        "Throttling",
        "ThrottlingException",
        "TooManyRequestsException",
    }
)

_INVALID: Final = "ValidationException"
_SERVER_FAULT: Final = 500
_TOO_LARGE: Final = 413


@dataclass(frozen=True, slots=True)
class _Meaning:
    kind: type[IdempotencyError]
    message: str
    """May name the {table} and the {cause}, which is the name of the vendor's error."""

    def error(self, *, table: str, cause: str) -> IdempotencyError:
        return self.kind(self.message.format(table=repr(table), cause=cause))


_BUSY: Final = _Meaning(IdempotencyPersistenceConnectionError, "DynamoDB is not available ({cause}); retry")
_REFUSED: Final = _Meaning(IdempotencyPersistenceLayerError, "DynamoDB refused a request to table {table} ({cause})")
_ITEM_TOO_LARGE: Final = _Meaning(
    IdempotencySerializationError,
    "the result is too large for DynamoDB, whose items hold 400 KB; return less, such as a reference to the result",
)
_KEY_TOO_LONG: Final = _Meaning(
    IdempotencyPersistenceConfigError,
    "the idempotency key is too long for DynamoDB, which takes 2048 bytes as a partition key and 1024 as a sort key; "
    "use a shorter key_prefix",
)
_UNFIT: Final = _Meaning(
    IdempotencyPersistenceConfigError,
    "DynamoDB table {table} does not fit the requests; check its name, that key_attr and sort_key_attr are its string "
    "keys, and that no other attribute name is one of its keys or holds values of another type",
)
_CLOSED: Final = _Meaning(
    IdempotencyPersistenceConfigError,
    "the DynamoDB client is closed, or belongs to another event loop; pass a client that is open on this loop, or no "
    "client, and the layer makes its own",
)

# https://docs.aws.amazon.com/amazondynamodb/latest/developerguide/Programming.Errors.html
_BY_CODE: Final[tuple[tuple[frozenset[str], _Meaning], ...]] = (
    (
        THROTTLED,
        _Meaning(
            IdempotencyPersistenceConnectionError,
            "DynamoDB throttles table {table} ({cause}); retry, or raise the table's capacity",
        ),
    ),
    (
        frozenset({"InternalServerError", "ReplicatedWriteConflictException", "RequestTimeout", "ServiceUnavailable"}),
        _BUSY,
    ),
    (
        frozenset({"ResourceNotFoundException"}),
        _Meaning(
            IdempotencyPersistenceConfigError,
            "DynamoDB table {table} does not exist, or not in this region and account; create it, for development with "
            "`aidem create-table` or `await layer.create_table()`, or check its name and AWS_REGION",
        ),
    ),
    (
        DENIED,
        _Meaning(
            IdempotencyPersistenceConfigError,
            "access to DynamoDB table {table} is denied; allow the role dynamodb:UpdateItem, dynamodb:GetItem and "
            "dynamodb:DeleteItem on it, and to list records dynamodb:Query and dynamodb:Scan",
        ),
    ),
    (
        frozenset(
            {
                "ExpiredToken",
                "ExpiredTokenException",
                "IncompleteSignatureException",
                "InvalidClientTokenId",
                "InvalidSignatureException",
                "MissingAuthenticationTokenException",
                "UnrecognizedClientException",
            }
        ),
        _Meaning(
            IdempotencyPersistenceConfigError,
            "DynamoDB does not accept the AWS credentials ({cause}); renew them, and check the machine's clock",
        ),
    ),
)

_BY_TYPE: Final[tuple[tuple[type[Exception] | tuple[type[Exception], ...], _Meaning], ...]] = (
    (
        (ConnectionError, HTTPClientError, ResponseParserError, OSError),
        _Meaning(
            IdempotencyPersistenceConnectionError,
            "DynamoDB could not be reached, or did not answer ({cause}); check the network and the endpoint, and retry",
        ),
    ),
    (
        (NoCredentialsError, PartialCredentialsError, CredentialRetrievalError, TokenRetrievalError),
        _Meaning(
            IdempotencyPersistenceConfigError,
            "there are no usable AWS credentials ({cause}); give the process a role, or set AWS_PROFILE, "
            "or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
        ),
    ),
    (
        NoRegionError,
        _Meaning(IdempotencyPersistenceConfigError, "no AWS region is set; set AWS_DEFAULT_REGION"),
    ),
    (
        BotoCoreError,
        _Meaning(
            IdempotencyPersistenceConfigError,
            "the AWS client cannot work with its settings ({cause}); check boto_config and the environment",
        ),
    ),
)


@contextlib.contextmanager
def translation(table_name: str) -> Generator[None]:
    """Raise what DynamoDB and its client raise as an error of aidem, but for a condition that failed."""
    try:
        yield
    except Exception as error:
        meaning = _meaning(error)
        if meaning is None:
            raise
        raise meaning.error(table=table_name, cause=code_of(error) or type(error).__name__) from error


def too_large() -> IdempotencyError:
    """Return the error for a result that does not fit into an item."""
    return _ITEM_TOO_LARGE.error(table="", cause="")


def response_of(error: BaseException) -> dict[str, Any]:
    """Return what DynamoDB answered with an error; empty for an error that does not come from there."""
    return cast("dict[str, Any]", getattr(error, "response", None) or {})


def code_of(error: BaseException) -> str:
    """Return the name that DynamoDB gives to an error; `""` for an error that does not come from there."""
    return str(response_of(error).get("Error", {}).get("Code", ""))


def _meaning(error: Exception) -> _Meaning | None:
    """Return what an error means; None: it is none of the vendor's, or a condition that failed."""
    code = code_of(error)
    if code:
        return None if code == CONDITION_FAILED else _meaning_of_answer(code, response_of(error))
    wrapped: dict[str, Any] = getattr(error, "kwargs", {})
    if isinstance(error, HTTPClientError) and isinstance(wrapped.get("error"), RuntimeError | AttributeError):
        return _CLOSED  # what asyncio says of another loop, and aiobotocore of a client that was closed
    return next((meaning for types, meaning in _BY_TYPE if isinstance(error, types)), None)


def _meaning_of_answer(code: str, response: dict[str, Any]) -> _Meaning:
    status = response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    if status == _TOO_LARGE:
        return _ITEM_TOO_LARGE
    if code == _INVALID:
        # One code stands for everything that can be wrong with a request; only the text tells, and it holds no values.
        message = str(response["Error"].get("Message", "")).lower()
        if "item size" in message:
            return _ITEM_TOO_LARGE
        return _KEY_TOO_LONG if "size" in message and "key" in message else _UNFIT
    listed = next((meaning for codes, meaning in _BY_CODE if code in codes), _REFUSED)
    return _BUSY if listed is _REFUSED and status >= _SERVER_FAULT else listed
