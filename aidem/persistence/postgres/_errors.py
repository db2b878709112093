"""What the server, a pooler and a driver can answer, as errors of aidem.

Drivers have classes of their own for the same errors, so the SQLSTATE decides, which the server sends:
https://www.postgresql.org/docs/current/errcodes-appendix.html. What the server says beside it is left out: it may quote
what is stored.
"""

from __future__ import annotations

import ssl
from typing import TYPE_CHECKING, Final

from aidem.exceptions import (
    IdempotencyError,
    IdempotencyPersistenceConfigError,
    IdempotencyPersistenceConnectionError,
    IdempotencyPersistenceLayerError,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from aidem.persistence.postgres._table import Table

MAY_BE_APPLIED: Final = "the operation may have been applied"

_TRY_AGAIN_STATES: Final = frozenset({"40001", "40P01"})
"""Serialization failure and deadlock: nothing was written, and the same statement may work the next time."""

_CONNECTION: Final = {
    "08": "the connection failed",
    "53300": "it has no connection to spare; lower max_connections of the layers, raise that of the server, or put "
    "PgBouncer between them",
    "53100": "its disk is full; free some space",
    "53": "it lacks resources; see its log",
    "57P03": "it starts, stops or recovers; try again when it is done",
    "57014": "the statement was cancelled, by somebody or by statement_timeout",
    "57": "it was shut down, or has ended the connection; try again when it is up",
    "58": "it cannot read or write its files; see its log",
    "25006": "it takes no writes: it is a replica, or default_transaction_read_only is on; connect to the primary, or "
    "wait for the failover to end",
    "40001": "transactions kept failing to serialize; try again",
    "40P01": "deadlocks did not end; try again",
    "55P03": "a lock was not available within lock_timeout; look for a transaction left open",
}
_BEHIND_A_POOLER: Final = (
    "as behind a pooler that changes the server connection; give the layer prepared_statements=False, or a pool of "
    "your own statement_cache_size=0 (asyncpg) or prepare_threshold=None (psycopg)"
)
_CONFIG: Final = {
    "28": "it does not accept the user or the password, or pg_hba.conf does not let them in; see the URL",
    "3D000": "the database does not exist; see the URL",
    "26000": f"a prepared statement is gone, {_BEHIND_A_POOLER}",
    "42P05": f"a prepared statement is there already, {_BEHIND_A_POOLER}",
    "22021": "the idempotency key holds a NUL character, which PostgreSQL cannot store; see key_prefix",
    "54000": "the idempotency key is too long for an index of PostgreSQL, which takes about 2700 bytes; use a shorter "
    "key_prefix",
}
_RIGHTS: Final = "42501"
_UNFIT: Final = frozenset({"3F000", "42P01", "42703", "42P10", "42804", "42883", "42809", "22P02", "23502", "23514"})
"""No such schema, table or column, no unique index, a column of another type, or one more that must be filled."""


def state_of(error: BaseException) -> str:
    """Return the SQLSTATE of an error, or of one that it wraps; `""`: it does not come from a server."""
    states = (getattr(cause, "sqlstate", None) for cause in _chain(error))
    return next((state for state in states if isinstance(state, str)), "")


def is_worth_another_try(error: BaseException) -> bool:
    """Whether a statement may work when it is simply sent again: the server has refused it, or asyncpg, unsent.

    asyncpg refuses it when the server has said that it ends the session, and its connection is not closed yet.
    """
    return state_of(error) in _TRY_AGAIN_STATES or type(error).__name__ == "InternalClientError"


def is_already_there(error: BaseException) -> bool:
    """Whether a table or an index could not be created as there is one, or one is being made."""
    return state_of(error) in {"23505", "42710", "42P07"}


def ends_session(error: BaseException) -> bool:
    """Whether the server has ended the session, or its connection broke."""
    return state_of(error).startswith(("08", "57P"))


def spoils_connection(error: BaseException) -> bool:
    """Whether a connection is of no use any more: the driver has failed, or a prepared statement is gone."""
    return state_of(error) in {"", "0A000", "26000"} and not isinstance(error, IdempotencyError)


def translated(error: Exception, table: Table) -> IdempotencyPersistenceLayerError:
    """Return the error for an operation that failed."""
    state, name = state_of(error), type(error).__name__
    if state:
        failure = _meaning(state, table)
        # What a server refuses it has not done, unless it went down, or a pooler speaks for it.
        failure.may_be_applied = state.startswith(("08", "57")) or type(failure) is IdempotencyPersistenceLayerError
    elif isinstance(error, OSError) or any(kind.__name__ in _OF_CONNECTIONS for kind in type(error).__mro__):
        failure = IdempotencyPersistenceConnectionError(
            f"the connection to PostgreSQL was lost, or none was free ({name}); {MAY_BE_APPLIED}"
        )
    else:
        failure = IdempotencyPersistenceLayerError(f"PostgreSQL's driver failed with {name}; {MAY_BE_APPLIED}")
    failure.__cause__ = error
    return failure


def timed_out(timeout_seconds: float) -> IdempotencyPersistenceLayerError:
    """Return the error for an operation that took too long."""
    return IdempotencyPersistenceConnectionError(
        f"PostgreSQL did not answer within {timeout_seconds:.3g} s, which timeout_seconds allows; {MAY_BE_APPLIED}"
    )


def none_was_free(timeout_seconds: float) -> IdempotencyPersistenceLayerError:
    """Return the error for an operation that could not be sent in time."""
    failure = IdempotencyPersistenceConnectionError(
        f"PostgreSQL: no connection was free within {timeout_seconds:.3g} s, which timeout_seconds allows; raise "
        "max_connections, or see why the server is slow"
    )
    failure.may_be_applied = False
    return failure


def none_was_lent(timeout_seconds: float) -> IdempotencyPersistenceLayerError:
    """Return the error for an operation that could not be sent in time, as the pool of the user lent no connection."""
    failure = IdempotencyPersistenceConnectionError(
        f"the pool had no connection to lend within {timeout_seconds:.3g} s, which timeout_seconds allows: the "
        "application holds all of them, or PostgreSQL does not answer; give the pool more connections than bodies take "
        "at once, and take none before an idempotent call begins"
    )
    failure.may_be_applied = False
    return failure


def stayed_locked(timeout_seconds: float) -> IdempotencyPersistenceLayerError:
    """Return the error for a record that others keep from being looked at."""
    failure = IdempotencyPersistenceConnectionError(
        f"PostgreSQL: another transaction has held the record for {timeout_seconds:.3g} s, which timeout_seconds "
        "allows; look for one that was left open"
    )
    failure.may_be_applied = False
    return failure


def is_replica() -> IdempotencyPersistenceLayerError:
    """Return the error for a server that only repeats what another one does."""
    failure = IdempotencyPersistenceConnectionError(f"PostgreSQL cannot be used: {_CONNECTION['25006']}")
    failure.may_be_applied = False
    return failure


def unfit(table: Table, problem: str, remedy: str) -> IdempotencyPersistenceConfigError:
    """Return the error for a table that is not as it must be."""
    return IdempotencyPersistenceConfigError(f"PostgreSQL table {table.name!r} {problem}:\n{remedy}")


def lacks_rights(table: Table) -> IdempotencyPersistenceConfigError:
    """Return the error for a user that may not use the table."""
    return IdempotencyPersistenceConfigError(
        f"PostgreSQL denies this user the table {table.name!r}; let its owner run "
        f"GRANT SELECT, INSERT, UPDATE, DELETE ON {table.quoted} TO ..., and GRANT USAGE on its schema, or CREATE for "
        "create_table()"
    )


def connecting_failed(error: Exception, table: Table, *, timeout_seconds: float) -> IdempotencyPersistenceLayerError:
    """Return the error for a connection that could not be made."""
    state = state_of(error)
    failure = _meaning(state, table) if state else _unreachable(error, timeout_seconds)
    failure.__cause__ = error
    failure.may_be_applied = False  # what waits for a connection was not sent
    return failure


def _meaning(state: str, table: Table) -> IdempotencyPersistenceLayerError:
    if state == _RIGHTS:
        return lacks_rights(table)
    if state in _UNFIT:
        return unfit(
            table,
            f"does not exist in this database, or not with the columns that aidem needs (SQLSTATE {state}); create it "
            "with `aidem create-table` or `await layer.create_table()`, or by a migration with",
            table.ddl(),
        )
    for kind, meanings in (
        (IdempotencyPersistenceConnectionError, _CONNECTION),
        (IdempotencyPersistenceConfigError, _CONFIG),
    ):
        meaning = meanings.get(state) or meanings.get(state[:2])
        if meaning is not None:
            return kind(f"PostgreSQL answered SQLSTATE {state}: {meaning}")
    return IdempotencyPersistenceLayerError(
        f"PostgreSQL answered SQLSTATE {state}, which aidem did not expect; see its log"
    )


# What drivers and pools call their errors for connections that broke, or that were not to be had. The last one is
# raised by asyncpg when the server ends a session at the moment in which a statement is sent.
_OF_CONNECTIONS: Final = frozenset({"OperationalError", "InterfaceError", "TimeoutError", "InternalClientError"})


def _unreachable(error: Exception, timeout_seconds: float) -> IdempotencyPersistenceLayerError:
    if isinstance(error, ssl.SSLCertVerificationError):
        return IdempotencyPersistenceConfigError(
            "PostgreSQL cannot be used: this machine does not trust its certificate for that host; "
            "name its CA with ?sslrootcert=/path/to/ca.pem in the URL"
        )
    if isinstance(error, ValueError) and not isinstance(error, ssl.SSLError):
        return IdempotencyPersistenceConfigError(
            f"PostgreSQL cannot be used: the driver does not take the URL ({type(error).__name__}); write "
            "postgresql://user:password@host:5432/database, each part percent-encoded"
        )
    what = type(error).__name__
    if isinstance(error, TimeoutError):
        what = f"no answer within {timeout_seconds:.3g} s, which timeout_seconds allows"
    return IdempotencyPersistenceConnectionError(
        f"PostgreSQL cannot be reached ({what}): see that it runs, that the URL and the network lead there, and that "
        "?sslmode= in the URL suits it"
    )


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = getattr(error, "orig", None) or error.__cause__
