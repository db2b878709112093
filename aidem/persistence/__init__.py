"""Persistence layers keep the records; this module has the contract of every layer.

A layer stores and compares. It never decides, sleeps, retries or hashes; the engine does.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Collection, Mapping, Sequence  # noqa: TC003 - a user's tools resolve the protocol's annotations
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Protocol, Self, cast, runtime_checkable

from aidem._rules.lifecycle import Blocked, Claimed
from aidem._rules.record import OutcomeKind
from aidem._runtime.cancellation import Immediate, UncancellableFuture
from aidem.exceptions import IdempotencyPersistenceConfigError

if TYPE_CHECKING:
    from types import TracebackType

    from aidem._rules.record import DataRecord, RecordStatus

__all__ = [
    "Blocked",
    "Claimed",
    "Diagnosis",
    "Immediate",
    "OutcomeKind",
    "PersistenceLayer",
    "SupportsCompletionInTransaction",
    "SupportsCompletionItem",
    "SupportsDiagnosis",
    "SupportsPurge",
    "SupportsScan",
    "SupportsTakeOver",
    "SupportsWaitForChange",
    "UncancellableFuture",
    "open_persistence_layer",
]

URL_FORMS: Final = (
    "memory://",
    "sqlite:///relative/path",
    "sqlite:////absolute/path",
    "redis://host:6379/0",
    "rediss://host:6379/0",
    "redis+cluster://host:6379",
    "redis+sentinel://host:26379/service/0",
    "dynamodb://table",
    "postgresql://user:password@host:5432/database",
)


@runtime_checkable
class PersistenceLayer(Protocol):
    """Six operations, each one atomic step at the store; test yours with `aidem.testing.PersistenceLayerConformance`.

    **Timestamps and clocks.** `now` is the caller's clock in epoch seconds, and the timestamps of a proposed record
    count from it. If the store has a clock, the layer uses that one, moves the timestamps accordingly, and returns them
    as stored. A record is *expired* if `expiry_timestamp < floor(now)`; it then counts as absent, even if it is still
    stored. An INPROGRESS record is *lapsed* if `in_progress_expiry_timestamp` is set and is before now, in
    milliseconds. Expiry is never left to the store's own removal alone.

    **Ownership.** A stored record is *ours* while its owner equals the owner of the record passed in and its status is
    INPROGRESS. A record without an owner is never ours.

    **Cancellation.** Operations are usually `async def`; the engine then runs each of them in its own task, so that a
    cancelled caller does not leave a write half-done. A layer can instead return an `UncancellableFuture`, or an
    `Immediate` if it never waits; this saves the task.

    **Errors.** `IdempotencyPersistenceConnectionError` if the store cannot be reached, times out or throttles (the
    operation may have been applied); `IdempotencyPersistenceConfigError` for a missing table, a wrong schema or denied
    access; `IdempotencySerializationError` from `complete` if the record is too large for the store. A
    `ConnectionError`, a `TimeoutError`, a `socket.gaierror` and an `OSError` whose number says that the network or the
    host cannot be reached count as `IdempotencyPersistenceConnectionError`, too. The engine wraps other exceptions in
    `IdempotencyPersistenceLayerError`.

    An `acquire` that fails may have been applied, so the engine releases its claim. It does not if the store cannot
    have applied it: after an `IdempotencyPersistenceConfigError`, a `ConnectionRefusedError`, a `socket.gaierror`, and
    an error whose `may_be_applied` the layer has set to False. A layer that repeats a request must not raise one of
    these if the first request may have arrived.

    A layer holds no state of a call: one instance serves any number of functions, tasks, threads and event loops. It
    connects on first use or in `open`. A client belongs to the event loop it was made on; on another loop, or in a
    forked child, the layer opens a new one. A layer can be hashed and weakly referenced, by identity.

    A layer can also have `clock`, a function that returns epoch seconds: the engine then uses it instead of the clock
    of the machine, so that a test can move time.
    """

    def acquire(
        self, record: DataRecord, *, now: float, max_clock_skew_seconds: float = 0.0
    ) -> Awaitable[Claimed | Blocked]:
        """Store `record`, an INPROGRESS record, unless a live record of another owner is there.

        If the key is absent, expired or lapsed, the answer is `Claimed`, with the fence and the timestamps as stored.
        The new fence is the fence found plus one, or the time of the claim in milliseconds if there is no record. It is
        higher than every earlier fence of the key, also after take-over, release and expiry, as far as clocks agree;
        within one layer instance it is higher even if the clock stands still. Nothing of the record found is left: no
        result, no outcome, no validation hash. A record that is already ours is `Claimed`, too, as found: the reply to
        an earlier attempt was lost. Otherwise the answer is `Blocked`, with the record found. Layers that use the
        clocks of their callers add `max_clock_skew_seconds` to the lease of another owner.
        """
        ...

    def complete(self, record: DataRecord, *, now: float) -> Awaitable[bool]:
        """Store the outcome in `record`, a COMPLETED record, over the claim of the same owner, or if no record exists.

        True: stored, or stored by an earlier attempt (our owner, COMPLETED, same data and outcome). False: another
        record is there, and is not changed.
        """
        ...

    def renew(self, record: DataRecord, *, now: float) -> Awaitable[DataRecord | None]:
        """Set the timestamps of our claim to those of `record`; return it as stored, or None if it is not ours.

        Renewals may be applied late, twice and out of order, so a renewal never moves a claim back: if it would end
        earlier than the stored claim, nothing changes. A claim holds until `in_progress_expiry_timestamp`, without that
        until `lease_expiry_timestamp`, without both until it expires.

        A `lease_expiry_timestamp` of 0, without `in_progress_expiry_timestamp`, gives the claim up: it is stored as 0,
        by any clock, and puts the claim in doubt at once. It can be repeated. Any other renewal of a claim that was
        given up changes nothing and returns None.
        """
        ...

    def release(self, record: DataRecord) -> Awaitable[bool]:
        """Delete our claim, and return True; return False if it is not ours any more.

        Whether the owner still runs is not checked: releasing a record from `get` can delete a running claim. Operators
        release the record of an `IdempotencyInDoubtError`, whose lease has passed.
        """
        ...

    def get(self, key: str) -> Awaitable[DataRecord | None]:
        """Return the record of a key as it is stored now, expired or not, or None."""
        ...

    def forget(self, key: str) -> Awaitable[None]:
        """Delete any record of the key, without conditions: for operators who resolve a key by hand."""
        ...

    async def open(self) -> None:
        """Connect, and raise an error if the layer cannot work. Optional: the first use opens it. Can be repeated."""
        ...

    async def aclose(self) -> None:
        """Close what the layer opened, never a client that was passed in. Can be repeated; a later use reopens it."""
        ...

    async def __aenter__(self) -> Self:
        """Open the layer."""
        ...

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close the layer."""
        ...


@runtime_checkable
class SupportsWaitForChange(Protocol):
    """A layer that can wake waiters when a record changes, so that they do not have to poll."""

    async def wait_for_change(self, key: str, timeout_seconds: float) -> None:
        """Return when the record may have been completed or released, at the latest after the time-out.

        A change between the caller's last read and this call may be missed; the engine reads again after the time-out.
        """
        ...


@runtime_checkable
class SupportsTakeOver(Protocol):
    """A layer that can take a claim over to resolve it; prove yours with `aidem.testing.TakeOverConformance`."""

    def take_over(
        self,
        found: DataRecord,
        record: DataRecord,
        *,
        now: float,
        max_clock_skew_seconds: float = 0.0,
        force: bool = False,
    ) -> Awaitable[DataRecord | None]:
        """Store `record`, an INPROGRESS record, in the place of the claim `found`, in one atomic step.

        Done only while the stored record is INPROGRESS, has not expired, has the owner and the fence of `found`, also
        where these are None and 0, and its lease has passed: the lease ends at `in_progress_expiry_timestamp`, without
        that at `lease_expiry_timestamp`. So a claim that must not be taken over by `acquire` can be taken over here,
        one that was given up at once, and one without a lease never. With `force` the lease does not count.

        The answer is the record as stored, with the fence found plus one; nothing else of the claim found is left. A
        record that is already ours is answered as found: the reply to an earlier try was lost. Everything else is
        None, and nothing changes. Layers that judge by their callers' clocks add `max_clock_skew_seconds` to the lease.
        A claim that an open transaction holds is not taken over, with `force` neither.

        A layer whose own clock judges moves the expiry by whole seconds, to the nearest: a claim in doubt is put back
        at every check that does not know, and must not expire later each time.
        """
        ...


@runtime_checkable
class SupportsCompletionInTransaction(Protocol):
    """A layer that can store an outcome in a transaction of the caller's, on the database that holds the records.

    The claim is made and renewed on the layer's own connection, so that everybody sees it; only the completion is in
    the caller's transaction. While that transaction is open it *holds* the record, and these rules are added to
    those of `PersistenceLayer`. No operation waits for the transaction. `acquire` answers `Blocked` with the record as
    found, also where its lease has passed: nobody takes it over. `renew` and `release` raise
    `IdempotencyHeldByTransactionError`. `get` answers the record as it was before the transaction. A store that locks
    more than the record, as SQLite does, may let operations wait for a short time.

    Prove it with `aidem.testing.CompletionInTransactionConformance`.
    """

    def check_transaction(self, transaction: object, *, blocking: bool) -> None:
        """Refuse what `complete_in` cannot write in: the engine asks this first, before anything is written.

        `blocking` says that an ordinary function asks, from a thread without an event loop.

        Raises:
            IdempotencyUsageError: It is not an open transaction of a kind that the layer knows; the message says what
                to pass.
        """
        ...

    def complete_in(self, transaction: object, record: DataRecord, *, now: float) -> Awaitable[bool]:
        """Store the outcome in `record`, in the transaction, over the claim of the same owner, and nowhere else.

        True: stored, as soon as the transaction is committed. False: the transaction sees no claim of that owner;
        nothing was written: unlike `complete`, it stores nothing where no record is. It runs on the event loop or, for
        a blocking transaction, in the thread of the caller, and then never suspends. Errors of the caller's driver are
        raised as they are.

        Raises:
            IdempotencyHeldByTransactionError: Another open transaction holds the claim, which is not waited for;
                nothing was written. False says the same, but the caller is not told of the other transaction then.
        """
        ...

    def is_free(self, record: DataRecord) -> Awaitable[bool]:
        """Whether the claim is there, INPROGRESS and of the record's owner, and held by no open transaction.

        It is asked on the layer's connection, also about the claim of another caller.
        """
        ...


@runtime_checkable
class SupportsCompletionItem(Protocol):
    """A layer whose store takes several writes in one request that is applied as a whole, as DynamoDB does."""

    def completion_item(self, record: DataRecord, *, now: float) -> dict[str, Any]:
        """Return the write that stores the outcome in `record` over the claim of the same owner, and nowhere else.

        The whole request must fail where that claim is not there. Nothing is sent. For DynamoDB it is the value of
        `Update` in `TransactItems`, as the low-level client takes it.
        """
        ...


@runtime_checkable
class SupportsScan(Protocol):
    """A layer that can list its records, for operators; prove yours with `aidem.testing.ScanConformance`."""

    def scan(
        self, *, prefix: str = "", status: RecordStatus | None = None, limit: int | None = None
    ) -> AsyncIterator[DataRecord]:
        """Iterate over the records as they are stored now, expired or not, each once, in any order.

        Records that come or go meanwhile may be missed. It reads a small page at a time, so that calls of the service
        go on in between, and skips what it cannot read and what is no record of aidem or AWS Powertools.

        Args:
            prefix: What the idempotency key begins with, character by character.
            status: `INPROGRESS` or `COMPLETED`, as stored. Default: either.
            limit: How many records at most. Default: all.
        """
        ...


@runtime_checkable
class SupportsPurge(Protocol):
    """A layer that removes expired records on demand; prove yours with `aidem.testing.PurgeConformance`."""

    def purge(self) -> Awaitable[int]:
        """Remove all records that have expired, a few at a time; return how many."""
        ...


class Diagnosis(NamedTuple):
    """What a layer has found out about its store, for operators.

    Attributes:
        facts: Versions, settings and sizes, by name.
        problems: What endangers records or keeps the layer from working; each says what to do.
    """

    facts: Mapping[str, str]
    problems: Sequence[str]


@runtime_checkable
class SupportsDiagnosis(Protocol):
    """A layer that can say what its store is, and what endangers the records in it."""

    def diagnose(self) -> Awaitable[Diagnosis]:
        """Connect and look, as far as the layer's rights allow; nothing is changed.

        Raises:
            IdempotencyPersistenceLayerError: The store cannot be reached or used.
        """
        ...


ATTRIBUTE_PARAMETERS: Final = (
    *("expiry_attr", "in_progress_expiry_attr", "status_attr", "data_attr", "validation_key_attr", "owner_attr"),
    *("fence_attr", "lease_expiry_attr", "outcome_attr", "note_attr"),
)
DYNAMODB_PARAMETERS: Final = {
    **{name: name for name in (*ATTRIBUTE_PARAMETERS, "key_attr", "sort_key_attr", "static_pk_value")},
    "region": "region_name",
    "endpoint": "endpoint_url",
}
"""The options of `DynamoDBPersistenceLayer` by their names in a URL."""


def open_persistence_layer(url: str) -> PersistenceLayer:
    """Return a new layer for a URL; it connects on first use.

    Parameters after a `?` are percent-encoded. Redis and DynamoDB take the names of attributes, such as
    `?owner_attr=token`. DynamoDB also takes `key_attr`, `sort_key_attr`, `static_pk_value`, `region` and `endpoint`,
    Redis also what redis-py takes, and PostgreSQL what asyncpg takes. SQLite takes `in_application_database=true`.
    Others are refused.

    Args:
        url: `memory://`; `sqlite:///relative/path` or `sqlite:////absolute/path`, as in SQLAlchemy;
            `redis://host:6379/0`, as in redis-py; `redis+cluster://host:6379,host2:6379`;
            `redis+sentinel://host:26379,host2:26379/service/0`; with TLS `rediss…` instead of `redis…`;
            `dynamodb://table`, with credentials, and by default region and endpoint, from the AWS environment;
            `postgresql://user:password@host:5432/database`, as in asyncpg.

    Raises:
        IdempotencyPersistenceConfigError: It is not one of these URLs, or has other parameters.
    """
    if not isinstance(cast("object", url), str):
        raise _names_no_layer(f"open_persistence_layer takes a URL as text, not {type(url).__name__}")
    scheme, separator, rest = url.partition("://")
    place, _, query = rest.partition("?")
    if scheme == "memory" and separator and not rest:
        from aidem.persistence.memory import MemoryPersistenceLayer

        return MemoryPersistenceLayer()
    if scheme == "sqlite" and len(place) > 1 and place.startswith("/"):
        from aidem.persistence.sqlite import SQLitePersistenceLayer

        switch = _parameters(query, ("in_application_database",)).get("in_application_database", "false")
        if switch not in {"true", "false"}:
            raise IdempotencyPersistenceConfigError("in_application_database in a URL must be true or false")
        return SQLitePersistenceLayer(place[1:], in_application_database=switch == "true")
    if scheme.partition("+")[0] in {"redis", "rediss"} and rest:
        from aidem.persistence.redis import RedisPersistenceLayer

        # Names of attributes are for the layer; redis-py gets all other parameters as they are.
        server, mark, parameters = url.partition("?")
        parts = parameters.split("&")
        ours = [part for part in parts if part.partition("=")[0] in ATTRIBUTE_PARAMETERS]
        theirs = "&".join(part for part in parts if part not in ours)
        names: dict[str, Any] = _parameters("&".join(ours), ATTRIBUTE_PARAMETERS)
        return RedisPersistenceLayer(f"{server}{mark * bool(theirs)}{theirs}" if ours else url, **names)
    if scheme == "dynamodb" and place:
        from aidem.persistence.dynamodb import DynamoDBPersistenceLayer

        given = _parameters(query, DYNAMODB_PARAMETERS)
        options: dict[str, Any] = {DYNAMODB_PARAMETERS[name]: value for name, value in given.items()}
        return DynamoDBPersistenceLayer(place, **options)
    if scheme in {"postgresql", "postgres"} and rest:
        from aidem.persistence.postgres import PostgresPersistenceLayer

        return PostgresPersistenceLayer(url)
    # A URL may hold a password: only what stands before the colon is shown.
    raise _names_no_layer(f"this URL of scheme {scheme if separator else ''!r} names no persistence layer")


def _parameters(query: str, known: Collection[str]) -> dict[str, str]:
    """Return the parameters of a URL.

    Raises:
        IdempotencyPersistenceConfigError: One is not known, or is there twice.
    """
    from urllib.parse import parse_qsl  # only those who name a layer by a URL need it

    pairs = parse_qsl(query, keep_blank_values=True)
    names = [name for name, _ in pairs]
    for name in names:
        if name not in known:
            raise IdempotencyPersistenceConfigError(
                f"the parameter {name!r} of this URL is not known; write {', '.join(sorted(known))}"
            )
        if names.count(name) > 1:
            raise IdempotencyPersistenceConfigError(f"the parameter {name!r} is in this URL more than once")
    return dict(pairs)


def _names_no_layer(what: str) -> IdempotencyPersistenceConfigError:
    return IdempotencyPersistenceConfigError(f"{what}; write {', '.join(URL_FORMS[:-1])} or {URL_FORMS[-1]}")
