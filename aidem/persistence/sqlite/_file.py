"""The file: made, recognised and opened; and what SQLite's errors mean."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import random
import sqlite3
import stat
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeVar

from aidem._rules import lifecycle
from aidem._runtime.threads import Lock
from aidem.exceptions import (
    IdempotencyError,
    IdempotencyHeldByTransactionError,
    IdempotencyPersistenceConfigError,
    IdempotencyPersistenceConnectionError,
    IdempotencyPersistenceLayerError,
    IdempotencySerializationError,
    IdempotencyUsageError,
)
from aidem.persistence._stored import decoded
from aidem.persistence.sqlite._records import Tables

if TYPE_CHECKING:
    from collections.abc import Callable

    from aidem._rules.lifecycle import Blocked
    from aidem._rules.record import DataRecord

logger = logging.getLogger("aidem")

T = TypeVar("T")

APPLICATION_ID: Final = int.from_bytes(b"aide")
SCHEMA_VERSION: Final = 2
APPLICATION_PREFIX: Final = "aidem_"
"""What the names of our tables begin with in the database of an application, where the file's header is not ours."""

SMALLEST_DATABASE: Final = 512
PAGES_IN_LOG: Final = 4000  # 16 MB
RETRY_SECONDS: Final = (0.0002, 0.002)
LOGS: Final = ("-wal", "-shm")

# Where there are no users, every file belongs to 0 and says that everybody may write it.
_user: Final = getattr(os, "geteuid", int)
_WRITABLE_BY_ALL: Final = stat.S_IWOTH if hasattr(os, "geteuid") else 0

# Whoever closes a descriptor of a file drops all locks that its process has on it, SQLite's too: so a file is created,
# and that descriptor closed, before any thread of this process opens it.
_creating: Final = Lock()

# One statement, so that it sees one state.
_IDENTIFY: Final = """
    SELECT application_id, user_version, (SELECT count(*) FROM sqlite_master)
    FROM pragma_application_id, pragma_user_version
"""

_MAKE_SCHEMA_TABLE: Final = "CREATE TABLE aidem_schema (version INTEGER NOT NULL)"
_DELETE_VERSION: Final = "DELETE FROM aidem_schema"
_INSERT_VERSION: Final = "INSERT INTO aidem_schema VALUES (?)"
_SELECT_VERSION: Final = "SELECT version FROM aidem_schema"
_HAS_SCHEMA: Final = "SELECT 1 FROM sqlite_master WHERE type = 'table' AND name = 'aidem_schema'"

_TRANSIENT: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EMFILE, errno.ENFILE})
_LOCKED: Final[tuple[type[IdempotencyPersistenceLayerError], str]] = (
    IdempotencyPersistenceConnectionError,
    "it is locked by another process; retry, look for a transaction left open, or raise busy_timeout_seconds",
)
_MEANINGS: Final[dict[int, tuple[type[IdempotencyError], str]]] = {
    sqlite3.SQLITE_BUSY: _LOCKED,
    sqlite3.SQLITE_PROTOCOL: _LOCKED,
    sqlite3.SQLITE_FULL: (IdempotencyPersistenceConnectionError, "the disk is full; free some space and retry"),
    sqlite3.SQLITE_IOERR: (
        IdempotencyPersistenceConnectionError,
        "it cannot be read or written; see that the disk works and has space left, then retry",
    ),
    sqlite3.SQLITE_TOOBIG: (IdempotencySerializationError, "the record is too large for SQLite; return less"),
    sqlite3.SQLITE_READONLY: (
        IdempotencyPersistenceConfigError,
        "it must not be written; give this user the right to write to it and to its directory",
    ),
    sqlite3.SQLITE_CANTOPEN: (
        IdempotencyPersistenceConfigError,
        "it cannot be opened; give this user the right to read and write it, and to write to its directory",
    ),
    sqlite3.SQLITE_CORRUPT: (
        IdempotencyPersistenceConfigError,
        "it is damaged; restore it, or move it away, with its -wal and -shm files, to begin with an empty one",
    ),
    sqlite3.SQLITE_NOTADB: (
        IdempotencyPersistenceConfigError,
        "it is not an SQLite database; give the path of a file that is, or that does not exist yet",
    ),
    sqlite3.SQLITE_ERROR: (
        IdempotencyPersistenceConfigError,
        "its tables were changed; move it away, with its -wal and -shm files, to begin with an empty one",
    ),
}


class DatabaseFile:
    """A file that holds records, or will.

    Attributes:
        path: Where it is, absolute.
        busy_timeout_seconds: How long to wait while another connection writes.
        is_of_application: Whether it is the database of an application, in which the records are guests.
        tables: Where in it the records are.
        warnings: What was noticed about it when it was opened, and logged.
    """

    def __init__(
        self, path: str | os.PathLike[str], *, busy_timeout_seconds: float, is_of_application: bool = False
    ) -> None:
        if os.fspath(path) == ":memory:":
            raise IdempotencyPersistenceConfigError(
                "SQLitePersistenceLayer(':memory:') would forget its records with its connection; "
                "use aidem.persistence.memory.MemoryPersistenceLayer()"
            )
        self.path = Path(os.path.abspath(path))  # noqa: PTH100 - Path.absolute keeps `..`
        self.busy_timeout_seconds = busy_timeout_seconds
        self.is_of_application = is_of_application
        self.tables = Tables(APPLICATION_PREFIX if is_of_application else "")
        self._identity: tuple[int, int] | None = None
        self.warnings = set[str]()

    def holds_records(self) -> bool:
        """Whether records can be in the file; who wants to know does not want it to be made or changed."""
        if not self.path.exists() or self.path.stat().st_size == 0:
            return False
        if not self.is_of_application:
            return True  # or a file that is not ours, which `connect` refuses
        try:
            with contextlib.closing(sqlite3.connect(f"{self.path.as_uri()}?mode=rw", uri=True)) as connection:
                return connection.execute(_HAS_SCHEMA).fetchone() is not None
        except sqlite3.Error:
            return True  # `connect` says what is wrong with it

    def connect(self) -> sqlite3.Connection:
        """Open the file, made if it is not there, without touching one that is not ours.

        Raises:
            IdempotencyPersistenceConfigError: It is not a file of ours, or must not be written.
            OSError, sqlite3.Error: See `translated`.
        """
        # Only its owner may read it; SQLite gives its `-wal` and `-shm` files the same rights.
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0)
        with _creating, contextlib.suppress(FileExistsError):
            os.close(os.open(self.path, flags, 0o600))
        status = os.lstat(self.path)
        self._refuse_link_or_device(status, "it")
        if 0 < status.st_size < SMALLEST_DATABASE:  # SQLite would take a single byte for nothing
            raise self._refusal("it is not an SQLite database; give the path of one, or a new one")
        self._warn_of_other_writers(self.path, status)
        self._identity = _identity(status)
        self._narrow_logs(stat.S_IMODE(status.st_mode))
        connection = sqlite3.connect(
            f"{self.path.as_uri()}?mode=rw",
            uri=True,
            timeout=0,  # see `patiently`
            isolation_level=None,
            check_same_thread=False,
        )
        try:
            self.patiently(lambda: self._prepare(connection))
        except BaseException:
            connection.close()
            raise
        connection.text_factory = decoded
        return connection

    def patiently(self, action: Callable[[], T]) -> T:
        """Repeat the action, which does nothing where the file is locked, until it is not.

        SQLite's own handler sleeps ever longer, so that who comes last waits longest; and it is not asked at all
        while the write-ahead log is turned on.

        Raises:
            sqlite3.OperationalError: It stayed locked for `busy_timeout_seconds`.
        """
        deadline = time.monotonic() + self.busy_timeout_seconds
        while True:
            try:
                return action()
            except sqlite3.OperationalError as error:
                if not is_locked(error) or time.monotonic() > deadline:
                    raise
            pause()

    def was_replaced(self) -> bool:
        """Whether another file, or none, is at the path by now; other processes then do not see what we write."""
        try:
            return _identity(os.lstat(self.path)) != self._identity
        except OSError:
            return True

    def translated(self, error: Exception) -> Exception:
        """Return what the caller is to see: an error for this caller alone, with the original as its cause.

        What SQLite says is left out: it may quote what is stored. So are the tracebacks of its causes, whose
        frames hold the futures of all callers, which hold the error.
        """
        if isinstance(error, sqlite3.Error):
            name = getattr(error, "sqlite_errorname", type(error).__name__)
            kind, advice = _MEANINGS.get(_code(error), (IdempotencyPersistenceLayerError, f"SQLite failed with {name}"))
            if self.is_of_application and _code(error) == sqlite3.SQLITE_ERROR:
                advice = f"its tables {APPLICATION_PREFIX}… were changed; drop them all to begin with empty ones"
            own: Exception = kind(f"{self.path}: {advice}")
        elif isinstance(error, OSError) and error.errno in _TRANSIENT:
            own = IdempotencyPersistenceConnectionError(
                f"{self.path} cannot be made: {error.strerror}; retry after that"
            )
        elif isinstance(error, OSError):
            own = self._refusal(
                f"{error.strerror}; its directory must exist, and this user must have the right to write there"
            )
        elif isinstance(error, (IdempotencyPersistenceConfigError, IdempotencyPersistenceConnectionError)):
            own = type(error)(str(error))
        else:
            return error
        own.__cause__ = error
        cause: BaseException | None = error
        while cause is not None:
            cause.__traceback__ = None
            cause = cause.__cause__ or cause.__context__
        return own

    def refusal_of_transaction(self, error: Exception) -> IdempotencyUsageError | None:
        """Return what an error in a transaction of the application says about its use; None: nothing."""
        code = getattr(getattr(error, "orig", error), "sqlite_errorcode", None)  # SQLAlchemy wraps those of its drivers
        if code == sqlite3.SQLITE_BUSY_SNAPSHOT:
            return IdempotencyUsageError(
                "the transaction sees the file as it was before the last write, so it cannot write; begin it in the "
                "body of the call, with BEGIN IMMEDIATE"
            )
        if code == sqlite3.SQLITE_ERROR:
            return IdempotencyUsageError(
                f"the transaction is not on {self.path}, where the records are, or their tables were changed"
            )
        return None

    # --- What is answered where another transaction has kept the write lock for too long ----------------------------

    def locked(self, _found: DataRecord | None) -> IdempotencyPersistenceLayerError:
        """Return that it is locked; nothing was done."""
        kind, advice = _LOCKED
        error = kind(f"{self.path}: {advice}")
        error.may_be_applied = False
        return error

    def blocked(self, found: DataRecord | None) -> Blocked | IdempotencyPersistenceLayerError:
        """Return the claim found, which nobody can take over meanwhile, or that it is locked."""
        return lifecycle.acquire_held(found) or self.locked(found)

    def held(self, _found: DataRecord | None) -> IdempotencyHeldByTransactionError:
        """Return that a claim can be neither changed nor taken over."""
        return IdempotencyHeldByTransactionError(f"{self.path}: another transaction keeps it locked")

    def refused_inside(self, _found: DataRecord | None) -> IdempotencyUsageError:
        """Return that waiting would never end, as the caller itself holds the lock."""
        return IdempotencyUsageError(
            f"{self.path}: a transaction that has completed an idempotent call is still open here, and another "
            "idempotent call would wait for its end for ever; commit it first"
        )

    # ----------------------------------------------------------------------------------------------------------------

    def _narrow_logs(self, rights: int) -> None:
        """See to logs that are there already: SQLite gives only new ones the rights of the file."""
        for suffix in LOGS:
            log = self.path.with_name(f"{self.path.name}{suffix}")
            with contextlib.suppress(FileNotFoundError):
                status = os.lstat(log)
                self._refuse_link_or_device(status, f"its {suffix} file")
                mode = stat.S_IMODE(status.st_mode)
                if mode & ~rights:
                    with contextlib.suppress(PermissionError):  # it belongs to another user, of which we warn
                        log.chmod(mode & rights)
                self._warn_of_other_writers(log, status)

    def _refuse_link_or_device(self, status: os.stat_result, what: str) -> None:
        if stat.S_ISLNK(status.st_mode):
            raise self._refusal(f"{what} is a symbolic link; give the path of the file itself")
        if not stat.S_ISREG(status.st_mode):
            raise self._refusal(f"{what} is not a regular file; give the path of a file")

    def _warn_of_other_writers(self, path: Path, status: os.stat_result) -> None:
        """Say once who else can forge results and drop claims; services that share a file by group are let be."""
        problems = {
            f"{path} is writable by all users, who can forge results and drop claims; chmod o-w": (
                status.st_mode & _WRITABLE_BY_ALL
            ),
            f"{path} belongs to another user, who can forge results and drop claims; chown it to this one": (
                status.st_uid not in {0, _user()}
            ),
        }
        for problem in [problem for problem, found in problems.items() if found and problem not in self.warnings]:
            self.warnings.add(problem)
            logger.warning("SQLite: %s", problem)

    def _prepare(self, connection: sqlite3.Connection) -> None:
        # What has SQLite opened? It resolves a symbolic link that was put there after we looked.
        ((_, _, opened),) = connection.execute("PRAGMA database_list")
        if Path(opened).resolve() != self.path.parent.resolve() / self.path.name or self.was_replaced():
            raise self._refusal("it was replaced while it was being opened; see who writes to its directory")
        if self.is_of_application:
            self._make_schema_of_application(connection)
        else:
            self._version(connection)  # before anything is written
            (mode,) = connection.execute("PRAGMA journal_mode = WAL").fetchone()
            if mode != "wal":
                raise self._refusal("its file system does not support a write-ahead log; use a local disk")
            # Claims of a large file touch pages all over it: the more gather in the log, the less is written twice.
            connection.execute(f"PRAGMA wal_autocheckpoint = {PAGES_IN_LOG}")
            connection.execute("BEGIN IMMEDIATE")
            version = self._version(connection)
            connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")  # fails if the file must not be written
            if version == 0:
                connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
            self._upgrade(connection, version)
            connection.execute("ROLLBACK" if version == SCHEMA_VERSION else "COMMIT")
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("PRAGMA fullfsync = ON")  # macOS: fsync alone does not reach the disk

    def _make_schema_of_application(self, connection: sqlite3.Connection) -> None:
        """Make our tables beside those of the application; where they are there, its transactions hold up nothing."""
        if connection.in_transaction:
            connection.execute("ROLLBACK")  # its COMMIT found the file locked, as readers can without a log
        version = self._version_in_application(connection)
        if version < SCHEMA_VERSION:
            connection.execute("BEGIN IMMEDIATE")
            version = self._version_in_application(connection)  # others may have made them meanwhile
            self._upgrade(connection, version)
            if version == 0:
                connection.execute(_MAKE_SCHEMA_TABLE)
            connection.execute(_DELETE_VERSION)
            connection.execute(_INSERT_VERSION, (max(version, SCHEMA_VERSION),))
            connection.execute("COMMIT")
        if version > SCHEMA_VERSION:
            raise self._refused_version(version)

    def _upgrade(self, connection: sqlite3.Connection, version: int) -> None:
        for statements in self.tables.schema_steps[version:]:
            for statement in statements:
                connection.execute(statement)

    def _version_in_application(self, connection: sqlite3.Connection) -> int:
        """Return the version of the schema; 0: it is still to be made."""
        if connection.execute(_HAS_SCHEMA).fetchone() is None:
            return 0
        (version,) = connection.execute(_SELECT_VERSION).fetchone()
        return int(version)

    def _version(self, connection: sqlite3.Connection) -> int:
        """Return the version of the schema; 0: it is still to be made. Refuses a database that is not ours."""
        application_id, version, tables = connection.execute(_IDENTIFY).fetchone()
        if (application_id, version, tables) == (0, 0, 0):
            return 0
        if application_id != APPLICATION_ID:
            raise self._refusal(
                "it is a database of another application; give aidem a file of its own, or set "
                "in_application_database=True to keep the records beside that application's tables"
            )
        if not 0 < version <= SCHEMA_VERSION:
            raise self._refused_version(version)
        return int(version)

    def _refused_version(self, version: int) -> IdempotencyPersistenceConfigError:
        return self._refusal(f"it was made by a newer aidem (schema {version}); upgrade aidem, or give another path")

    def _refusal(self, reason: str) -> IdempotencyPersistenceConfigError:
        return IdempotencyPersistenceConfigError(f"{self.path} cannot hold records: {reason}")


def is_locked(error: sqlite3.Error) -> bool:
    """Whether another connection has kept SQLite from doing anything."""
    return _code(error) == sqlite3.SQLITE_BUSY


def pause() -> None:
    """Wait a moment for a lock."""
    time.sleep(random.uniform(*RETRY_SECONDS))  # noqa: S311 - not a secret


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def _code(error: sqlite3.Error) -> int:
    return getattr(error, "sqlite_errorcode", 0) & 0xFF  # the higher bits tell details
