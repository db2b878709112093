from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import os
import resource
import shutil
import sqlite3
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from aidem.exceptions import (
    IdempotencyPersistenceConfigError,
    IdempotencyPersistenceConnectionError,
    IdempotencyPersistenceLayerError,
    IdempotencySerializationError,
)
from aidem.persistence.sqlite import SQLitePersistenceLayer, _file, _records
from aidem.persistence.sqlite._file import DatabaseFile
from aidem.testing import FakeClock, claim_of, completed_of

NOBODY = 65534
BUSY_TIMEOUT_SECONDS = 0.05


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "records.sqlite3"


@pytest.fixture
def layer(path: Path) -> Iterator[SQLitePersistenceLayer]:
    layer = layer_at(path)
    yield layer
    asyncio.run(layer.aclose())


@pytest.fixture
def nobodys_directory() -> Iterator[Path]:
    """A directory of an ordinary user, as whom the test goes on: rights do not bind the superuser."""
    directory = Path(tempfile.mkdtemp()).resolve()
    is_superuser = os.geteuid() == 0
    if is_superuser:
        os.chown(directory, NOBODY, NOBODY)
        os.seteuid(NOBODY)
    yield directory
    if is_superuser:
        os.seteuid(0)
    directory.chmod(0o700)
    shutil.rmtree(directory)


def layer_at(path: str | os.PathLike[str]) -> SQLitePersistenceLayer:
    return SQLitePersistenceLayer(path, clock=FakeClock(), busy_timeout_seconds=BUSY_TIMEOUT_SECONDS)


def use(layer: SQLitePersistenceLayer, key: str = "key") -> None:
    """Claim a key and complete it, on a loop of its own."""

    async def claim_and_complete() -> None:
        now = layer.clock()
        answer = await layer.acquire(claim_of(key, now=now), now=now)
        assert await layer.complete(completed_of(answer.record, now=now), now=now)

    asyncio.run(claim_and_complete())


def close(layer: SQLitePersistenceLayer) -> None:
    asyncio.run(layer.aclose())


def keys_in(path: Path) -> list[str]:
    with closing(sqlite3.connect(path)) as connection:
        return [key for (key,) in connection.execute("SELECT id FROM records ORDER BY id")]


@contextlib.contextmanager
def limited(kind: int, limit: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(kind)
    resource.setrlimit(kind, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(kind, (soft, hard))


# --- Making the file ------------------------------------------------------------------------------------------------


def test_the_file_and_its_logs_are_for_their_owner_alone(layer: SQLitePersistenceLayer, path: Path) -> None:
    inherited = os.umask(0)
    try:
        use(layer)
    finally:
        os.umask(inherited)
    files = {file.name: stat.S_IMODE(file.stat().st_mode) for file in path.parent.iterdir()}
    assert files == {path.name: 0o600, f"{path.name}-shm": 0o600, f"{path.name}-wal": 0o600}


def test_every_commit_reaches_the_disk(path: Path) -> None:
    with closing(DatabaseFile(path, busy_timeout_seconds=1).connect()) as connection:
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        assert connection.execute("PRAGMA synchronous").fetchone() == (2,)
        assert connection.execute("PRAGMA fullfsync").fetchone() == (1,)


def test_the_log_is_bounded(path: Path) -> None:
    with closing(DatabaseFile(path, busy_timeout_seconds=1).connect()) as connection:
        assert connection.execute("PRAGMA wal_autocheckpoint").fetchone() == (_file.PAGES_IN_LOG,)


def test_an_empty_file_is_filled(layer: SQLitePersistenceLayer, path: Path) -> None:
    path.touch(0o640)
    use(layer)
    assert keys_in(path) == ["key"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


@pytest.mark.parametrize("make", [str, Path])
def test_a_relative_path_is_resolved_when_the_layer_is_made(
    make: Callable[[str], str | Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    layer = layer_at(make("records of 100%?#.sqlite3"))
    monkeypatch.chdir("elsewhere")
    use(layer)
    close(layer)
    assert keys_in(tmp_path / "records of 100%?#.sqlite3") == ["key"]


def test_a_directory_may_be_reached_by_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    layer = layer_at(tmp_path / "link" / "records.sqlite3")
    use(layer)
    close(layer)
    assert keys_in(tmp_path / "real" / "records.sqlite3") == ["key"]


async def test_a_file_of_an_earlier_aidem_keeps_its_records_and_gets_the_columns_it_lacks(path: Path) -> None:
    foreign_database(
        path,
        f"PRAGMA application_id = {_file.APPLICATION_ID}",
        "PRAGMA user_version = 1",
        *_records.Tables("").schema_steps[0],
        "INSERT INTO records (id, status, fence) VALUES ('old', 'COMPLETED', 7)",
    )
    for _opened in ("first", "again"):
        async with layer_at(path) as layer:
            old = await layer.get("old")
            assert old is not None
            assert (old.fence, old.note) == (7, None)
            now = layer.clock()
            await layer.acquire(claim_of("new", now=now, note="order 7"), now=now)
            new = await layer.get("new")
            assert new is not None
            assert new.note == "order 7"


# --- What is not ours is refused, and stays as it is ----------------------------------------------------------------


def foreign_database(path: Path, *statements: str) -> None:
    with closing(sqlite3.connect(path)) as connection:
        for statement in statements:
            connection.execute(statement)
        connection.commit()


THINGS: dict[str, tuple[Callable[[Path], object], str]] = {
    "text": (lambda path: path.write_text("not a database\n" * 100), "not an SQLite database"),
    "one byte": (lambda path: path.write_bytes(b"x"), "not an SQLite database"),
    "tables of others": (lambda path: foreign_database(path, "CREATE TABLE orders (id)"), "another application"),
    "a log of others": (
        lambda path: foreign_database(path, "PRAGMA journal_mode = WAL", "CREATE TABLE orders (id)"),
        "another application",
    ),
    "an id of others": (lambda path: foreign_database(path, "PRAGMA application_id = 7"), "another application"),
    "a version of others": (lambda path: foreign_database(path, "PRAGMA user_version = 1"), "another application"),
    "a later schema": (
        lambda path: foreign_database(
            path, f"PRAGMA application_id = {_file.APPLICATION_ID}", "PRAGMA user_version = 3"
        ),
        r"newer aidem \(schema 3\); upgrade aidem",
    ),
}


@pytest.mark.parametrize("thing", THINGS)
def test_a_file_that_is_not_ours_is_refused_and_left_alone(
    layer: SQLitePersistenceLayer, path: Path, thing: str
) -> None:
    make, message = THINGS[thing]
    make(path)
    before = path.read_bytes()
    with pytest.raises(IdempotencyPersistenceConfigError, match=message) as raised:
        use(layer)
    assert str(path) in str(raised.value)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_a_symbolic_link_is_refused_and_its_target_left_alone(layer: SQLitePersistenceLayer, path: Path) -> None:
    target = path.with_name("target")
    path.symlink_to(target)
    with pytest.raises(IdempotencyPersistenceConfigError, match="symbolic link"):
        use(layer)
    assert not target.exists()
    target.touch()
    with pytest.raises(IdempotencyPersistenceConfigError, match="symbolic link"):
        use(layer)
    assert target.read_bytes() == b""


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo])
def test_what_is_not_a_file_is_refused(
    layer: SQLitePersistenceLayer, path: Path, make: Callable[[Path], object]
) -> None:
    make(path)
    with pytest.raises(IdempotencyPersistenceConfigError, match="not a regular file"):
        use(layer)


def connect_while(replace: Callable[[], object], path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Open a file that somebody replaces when aidem has looked at it, and SQLite has not opened it yet."""
    connect = sqlite3.connect

    def replaced_before(*args: Any, **options: Any) -> sqlite3.Connection:
        replace()
        return connect(*args, **options)

    monkeypatch.setattr(sqlite3, "connect", replaced_before)
    DatabaseFile(path, busy_timeout_seconds=1).connect()


def test_a_link_put_there_while_the_file_is_being_opened_is_refused(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = path.with_name("target")
    with pytest.raises(IdempotencyPersistenceConfigError, match="replaced"):
        connect_while(lambda: path.symlink_to(path.rename(target)), path, monkeypatch)
    assert target.read_bytes() == b""


def test_another_file_put_there_while_the_file_is_being_opened_is_refused(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = path.with_name("other")
    other.touch()
    with pytest.raises(IdempotencyPersistenceConfigError, match="replaced"):
        connect_while(lambda: other.replace(path), path, monkeypatch)
    assert path.read_bytes() == b""


def test_a_link_that_replaces_the_file_in_use_is_refused(layer: SQLitePersistenceLayer, path: Path) -> None:
    use(layer)
    target = path.rename(path.with_name("target"))
    path.symlink_to(target)
    with pytest.raises(IdempotencyPersistenceConfigError, match="symbolic link"):
        use(layer, "later")


def test_a_file_that_was_deleted_in_use_is_made_anew_so_that_all_processes_see_one(
    layer: SQLitePersistenceLayer, path: Path
) -> None:
    use(layer, "early")
    path.unlink()
    use(layer, "late")
    close(layer)
    assert keys_in(path) == ["late"]


# --- Rights, as an ordinary user ------------------------------------------------------------------------------------


def test_a_directory_that_does_not_exist_is_named(tmp_path: Path) -> None:
    layer = layer_at(tmp_path / "missing" / "records.sqlite3")
    with pytest.raises(IdempotencyPersistenceConfigError, match=r"No such file or directory; its directory must exist"):
        use(layer)
    close(layer)


@pytest.mark.parametrize("mode", [0o500, 0o000])
def test_a_directory_that_must_not_be_written_is_refused(nobodys_directory: Path, mode: int) -> None:
    nobodys_directory.chmod(mode)
    layer = layer_at(nobodys_directory / "records.sqlite3")
    with pytest.raises(IdempotencyPersistenceConfigError, match=r"Permission denied; .* right to write there"):
        use(layer)
    nobodys_directory.chmod(0o700)
    use(layer)
    close(layer)


def test_a_file_in_a_directory_that_must_not_be_written_is_refused(nobodys_directory: Path) -> None:
    layer = layer_at(nobodys_directory / "records.sqlite3")
    use(layer)
    close(layer)
    nobodys_directory.chmod(0o500)
    with pytest.raises(IdempotencyPersistenceConfigError, match="right to write to it and to its directory"):
        use(layer)
    close(layer)


@pytest.mark.parametrize(("mode", "message"), [(0o400, "must not be written"), (0o000, "cannot be opened")])
def test_a_file_that_must_not_be_used_is_refused(nobodys_directory: Path, mode: int, message: str) -> None:
    path = nobodys_directory / "records.sqlite3"
    layer = layer_at(path)
    use(layer)
    close(layer)
    path.chmod(mode)
    with pytest.raises(IdempotencyPersistenceConfigError, match=message):
        asyncio.run(layer.open())
    close(layer)


# --- Faults of the disk ---------------------------------------------------------------------------------------------


def test_a_file_that_was_damaged_is_refused(layer: SQLitePersistenceLayer, path: Path) -> None:
    use(layer)
    close(layer)
    with path.open("r+b") as file:
        file.seek(4096)
        file.write(b"\xff" * (path.stat().st_size - 4096))
    with pytest.raises(IdempotencyPersistenceConfigError, match="damaged; restore it, or move it away"):
        use(layer)


def test_tables_that_were_changed_are_refused(layer: SQLitePersistenceLayer, path: Path) -> None:
    use(layer)
    close(layer)
    foreign_database(path, "DROP TABLE records")
    with pytest.raises(IdempotencyPersistenceConfigError, match="its tables were changed"):
        use(layer)


def test_a_full_disk_answers_no_claim_and_is_got_over(layer: SQLitePersistenceLayer, path: Path) -> None:
    use(layer, "before")
    log = path.with_name(f"{path.name}-wal")
    with limited(resource.RLIMIT_FSIZE, log.stat().st_size):
        with pytest.raises(
            IdempotencyPersistenceConnectionError, match="see that the disk works and has space left"
        ) as e:
            use(layer, "during")
        assert isinstance(e.value.__cause__, sqlite3.OperationalError)
    use(layer, "after")
    assert keys_in(path) == ["after", "before"]


def test_a_file_that_cannot_be_made_for_the_moment_may_be_retried(layer: SQLitePersistenceLayer, path: Path) -> None:
    async def open_without_descriptors() -> None:
        with limited(resource.RLIMIT_NOFILE, 3):
            await layer.open()

    with pytest.raises(IdempotencyPersistenceConnectionError, match=os.strerror(errno.EMFILE)):
        asyncio.run(open_without_descriptors())
    use(layer)
    assert keys_in(path) == ["key"]


# --- Other processes ------------------------------------------------------------------------------------------------


def test_a_file_that_stays_locked_is_said_to_be_locked(layer: SQLitePersistenceLayer, path: Path) -> None:
    use(layer, "before")
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(IdempotencyPersistenceConnectionError, match=r"locked by another process; .*busy_timeout"):
            use(layer, "during")
    use(layer, "after")
    assert keys_in(path) == ["after", "before"]


@contextlib.contextmanager
def writer_of_empty_file(path: Path) -> Iterator[sqlite3.Connection]:
    """Hold the lock at which turning the log on fails at once, though others may look."""
    path.touch()
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        yield other


def test_a_log_that_cannot_be_turned_on_is_said_to_be_locked(layer: SQLitePersistenceLayer, path: Path) -> None:
    with writer_of_empty_file(path), pytest.raises(IdempotencyPersistenceConnectionError, match="locked"):
        use(layer)
    use(layer)


def test_turning_on_the_log_waits_for_others(path: Path) -> None:
    async def opened_only_after(other: sqlite3.Connection) -> None:
        layer = SQLitePersistenceLayer(path, busy_timeout_seconds=30)
        opening = asyncio.ensure_future(layer.open())
        done, _ = await asyncio.wait([opening], timeout=0.1)
        assert not done
        other.execute("ROLLBACK")
        await opening
        await layer.aclose()

    with writer_of_empty_file(path) as other:
        asyncio.run(opened_only_after(other))


def test_a_database_without_a_log_is_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    connect = sqlite3.connect
    # SQLite's way to use a file system whose files cannot be shared in memory, as a log needs.
    monkeypatch.setattr(sqlite3, "connect", lambda url, **options: connect(f"{url}&vfs=unix-dotfile", **options))
    with pytest.raises(IdempotencyPersistenceConfigError, match="use a local disk"):
        DatabaseFile(path, busy_timeout_seconds=1).connect()


# --- What SQLite's errors mean --------------------------------------------------------------------------------------


def error_of(provoke: Callable[[sqlite3.Connection], object]) -> sqlite3.Error:
    with closing(sqlite3.connect(":memory:")) as connection:
        connection.execute("CREATE TABLE t (x)")
        with pytest.raises(sqlite3.Error) as raised:
            provoke(connection)
        return raised.value


def fill(connection: sqlite3.Connection) -> None:
    connection.execute("PRAGMA max_page_count = 3")
    connection.execute("INSERT INTO t VALUES (zeroblob(100000))")


def exceed(connection: sqlite3.Connection) -> None:
    connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, 10_000)
    connection.execute("INSERT INTO t VALUES (?)", ["private" * 10_000])


def race(_connection: sqlite3.Connection) -> None:
    error = sqlite3.OperationalError("locking protocol")  # takes SQLite ten seconds
    error.sqlite_errorcode = sqlite3.SQLITE_PROTOCOL
    raise error


def misread(connection: sqlite3.Connection) -> None:
    connection.execute("SELECT CAST(x'80ff' || 'private' AS TEXT)").fetchall()


@pytest.mark.parametrize(
    ("provoke", "kind", "message"),
    [
        (race, IdempotencyPersistenceConnectionError, "locked by another process"),
        (fill, IdempotencyPersistenceConnectionError, "the disk is full"),
        (exceed, IdempotencySerializationError, "too large for SQLite"),
        (misread, IdempotencyPersistenceLayerError, "SQLite failed with OperationalError"),
    ],
)
def test_an_error_of_sqlite_says_what_to_do_and_shows_no_result(
    path: Path, provoke: Callable[[sqlite3.Connection], object], kind: type[Exception], message: str
) -> None:
    error = error_of(provoke)
    own = DatabaseFile(path, busy_timeout_seconds=1).translated(error)
    assert type(own) is kind
    assert message in str(own)
    assert str(path) in str(own)
    assert own.__cause__ is error
    assert "private" not in str(own)


def test_the_cause_of_a_refusal_is_kept_without_the_frames_that_hold_its_callers(tmp_path: Path) -> None:
    with pytest.raises(IdempotencyPersistenceConfigError, match="its directory must exist") as raised:
        use(layer_at(tmp_path / "missing" / "records.sqlite3"))
    assert isinstance(raised.value.__cause__, FileNotFoundError)
    assert raised.value.__cause__.__traceback__ is None


def test_the_causes_of_an_error_are_kept_without_their_frames(path: Path) -> None:
    def fail() -> None:
        try:
            os.lstat(path)
        except FileNotFoundError as error:
            raise sqlite3.OperationalError from error

    with pytest.raises(sqlite3.OperationalError) as raised:
        fail()
    error = raised.value
    assert isinstance(error.__cause__, FileNotFoundError)
    assert error.__cause__.__traceback__ is not None
    assert DatabaseFile(path, busy_timeout_seconds=1).translated(error).__cause__ is error
    assert [error.__traceback__, error.__cause__.__traceback__] == [None, None]


@pytest.fixture
def without_collector() -> Iterator[None]:
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("without_collector")
def test_commits_that_fail_leave_no_descriptors(layer: SQLitePersistenceLayer, path: Path) -> None:
    use(layer, "before")
    opened = descriptors_of(path)
    assert opened
    log = path.with_name(f"{path.name}-wal")
    for number in range(3):
        with (
            limited(resource.RLIMIT_FSIZE, log.stat().st_size),
            pytest.raises(IdempotencyPersistenceConnectionError, match="see that the disk works"),
        ):
            use(layer, f"during {number}")
        use(layer, f"after {number}")
        assert descriptors_of(path) == opened
    close(layer)
    assert descriptors_of(path) == []


def descriptors_of(path: Path) -> list[str]:
    targets = list[str]()
    for descriptor in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # that of the directory itself
            targets.append(str(descriptor.readlink()))
    return sorted(target for target in targets if target.startswith(str(path)))


# --- Other users ----------------------------------------------------------------------------------------------------


def test_a_file_that_all_may_write_is_warned_of_once(
    layer: SQLitePersistenceLayer, path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    use(layer)
    close(layer)
    assert not caplog.records
    path.chmod(0o666)
    use(layer, "other")
    close(layer)
    use(layer, "another")
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert f"{path} is writable by all users, who can forge results and drop claims; chmod o-w" in caplog.text


def test_a_file_of_another_user_is_warned_of_and_one_that_a_group_shares_is_not(
    layer: SQLitePersistenceLayer, path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(layer)
    close(layer)
    path.chmod(0o660)
    use(layer, "shared")
    close(layer)
    assert not caplog.records
    if os.geteuid() == 0:
        os.chown(path, NOBODY, NOBODY)
    else:
        monkeypatch.setattr(_file, "_user", lambda: NOBODY)
    use(layer, "foreign")
    assert f"{path} belongs to another user, who can forge results and drop claims" in caplog.text


def test_logs_that_are_there_already_become_no_wider_than_the_file(layer: SQLitePersistenceLayer, path: Path) -> None:
    use(layer, "before")
    logs = [path.with_name(f"{path.name}{suffix}") for suffix in ("-wal", "-shm")]
    with closing(sqlite3.connect(path)) as other:  # which keeps the logs
        assert other.execute("SELECT count(*) FROM records").fetchone() == (1,)
        for log in logs:
            log.chmod(0o646)
        close(layer)
        use(layer, "after")
        assert [stat.S_IMODE(log.stat().st_mode) for log in logs] == [0o600, 0o600]


def test_a_log_that_only_another_user_may_narrow_is_warned_of(
    layer: SQLitePersistenceLayer, path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_path: Path, _mode: int) -> None:
        raise PermissionError

    log = path.with_name(f"{path.name}-wal")
    log.touch()
    log.chmod(0o666)
    monkeypatch.setattr(Path, "chmod", refuse)
    use(layer)
    assert f"{log} is writable by all users" in caplog.text


@pytest.mark.parametrize("suffix", ["-wal", "-shm"])
def test_a_log_that_is_a_link_is_refused_and_its_target_left_alone(
    layer: SQLitePersistenceLayer, path: Path, suffix: str
) -> None:
    use(layer)
    close(layer)
    target = path.with_name("target")
    target.write_bytes(b"private")
    path.with_name(f"{path.name}{suffix}").symlink_to(target)
    with pytest.raises(IdempotencyPersistenceConfigError, match=f"its {suffix} file is a symbolic link"):
        use(layer)
    assert target.read_bytes() == b"private"
