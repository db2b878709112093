"""PostgreSQL servers for tests, and PgBouncer before them, each on a free port and in a directory of its own.

    with started() as server:
        connect(server.url)
        server.crash()                                     # as `pg_ctl stop -m immediate`
        server.start()                                     # again, on the same port and directory

PostgreSQL refuses to run as root, so under root it runs as another user, to whom its directory belongs.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import AsyncGenerator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import asyncpg

from aidem._rules.lifecycle import Blocked, Claimed
from aidem._rules.record import DataRecord
from aidem.persistence.postgres import PostgresPersistenceLayer
from aidem.testing import claim_of, completed_of
from tests.support.servers import free_port, installed

START_SECONDS = 20.0
POLL_SECONDS = 0.02
# Nothing of these tests survives the machine, so nothing need reach its disk; a crash of the server alone loses none.
FAST = ("fsync=off", "full_page_writes=off", "autovacuum=off", "max_connections=200", "shared_buffers=32MB")


@dataclass
class PostgresServer:
    """A server process, or the place where one was.

    Attributes:
        directory: Its data, and the directory of its socket.
        settings: As in its configuration file.
    """

    directory: Path
    port: int
    settings: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"postgresql://aidem@127.0.0.1:{self.port}/postgres?sslmode=disable"

    def start(self) -> None:
        settings = [option for setting in (*FAST, *self.settings) for option in ("-c", setting)]
        command = [postgres_program("postgres"), "-D", str(self.directory), "-k", str(self.directory)]
        with (self.directory / "server.log").open("ab") as log:
            self.process = subprocess.Popen(
                [*command, "-h", "127.0.0.1", "-p", str(self.port), *settings],
                cwd=self.directory,
                env=os.environ | self.environment,
                stdout=log,
                stderr=log,
                **another_user(),
            )
        deadline = time.monotonic() + START_SECONDS
        while not self._accepts_connections():
            running = self.process.poll() is None and time.monotonic() < deadline
            assert running, f"PostgreSQL did not start: {(self.directory / 'server.log').read_text()[-2000:]}"
            time.sleep(POLL_SECONDS)

    def crash(self) -> None:
        """End it at once, as `pg_ctl stop -m immediate` does: it recovers from its log when it is started again."""
        self._end(signal.SIGQUIT)

    def restart_after_crash(self) -> None:
        self.crash()
        self.start()

    def stop(self) -> None:
        """End it in good order; whoever is connected is told."""
        self._end(signal.SIGINT)

    def _end(self, number: signal.Signals) -> None:
        assert self.process is not None
        self.process.send_signal(number)
        self.process.wait()

    def _accepts_connections(self) -> bool:
        command = [postgres_program("pg_isready"), "-q", "-h", "127.0.0.1", "-p", str(self.port)]
        return subprocess.run(command).returncode == 0


@contextlib.contextmanager
def started(*settings: str) -> Iterator[PostgresServer]:
    """Run a server of its own, with a superuser `aidem` who needs no password and a table."""
    with tempfile.TemporaryDirectory(prefix="aidem-postgres-", ignore_cleanup_errors=True) as name:
        directory = Path(name)
        if user := another_user():
            shutil.chown(directory, user["user"])
        options = ("--auth=trust", "--username=aidem", "--encoding=UTF8", "--locale=C")
        command = [postgres_program("initdb"), "-D", str(directory), *options, "--no-sync", "--no-instructions"]
        subprocess.run(command, check=True, cwd=directory, stdout=subprocess.DEVNULL, **user)
        server = PostgresServer(directory, free_port(), settings)
        try:
            server.start()
            yield server
        finally:
            if server.process is not None and server.process.poll() is None:
                server.crash()


@dataclass
class PgBouncer:
    """A pooler before a server."""

    port: int

    @property
    def url(self) -> str:
        return f"postgresql://aidem@127.0.0.1:{self.port}/postgres?sslmode=disable"


@contextlib.contextmanager
def pgbouncer_to(server: PostgresServer, *settings: str) -> Iterator[PgBouncer]:
    """Run PgBouncer in transaction mode, with few connections to the server."""
    with tempfile.TemporaryDirectory(prefix="aidem-pgbouncer-", ignore_cleanup_errors=True) as name:
        directory, port = Path(name), free_port()
        users, file = directory / "users.txt", directory / "pgbouncer.ini"
        users.write_text('"aidem" ""\n')
        file.write_text(
            "\n".join(
                [
                    "[databases]",
                    f"* = host=127.0.0.1 port={server.port}",
                    "[pgbouncer]",
                    f"listen_addr = 127.0.0.1\nlisten_port = {port}\nunix_socket_dir =",
                    f"auth_type = trust\nauth_file = {users}\nlogfile = {directory}/log",
                    "pool_mode = transaction\ndefault_pool_size = 4\nmax_client_conn = 500",
                    *settings,
                ]
            )
        )
        user = another_user()
        for path in (directory, users, file) if user else ():
            shutil.chown(path, user["user"])
        process = subprocess.Popen(
            [installed("pgbouncer"), "-q", str(file)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **user
        )
        try:
            ready = [postgres_program("pg_isready"), "-q", "-h", "127.0.0.1", "-p", str(port)]
            deadline = time.monotonic() + START_SECONDS
            while subprocess.run(ready).returncode != 0:
                assert process.poll() is None, f"PgBouncer did not start: {(directory / 'log').read_text()[-2000:]}"
                assert time.monotonic() < deadline, "PgBouncer does not answer"
                time.sleep(POLL_SECONDS)
            yield PgBouncer(port)
        finally:
            process.kill()
            process.wait()


def postgres_program(name: str) -> str:
    """Return the path of one of PostgreSQL's programs, which Debian does not put where programs are."""
    found = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"))
    return str(found[-1]) if found else installed(name)


def another_user() -> dict[str, Any]:
    """Return the options that make a child process somebody else's, where this one is root's."""
    if os.geteuid() != 0:
        return {}
    names = {entry.pw_name for entry in pwd.getpwall()}
    user = pwd.getpwnam("postgres" if "postgres" in names else "nobody")
    return {"user": user.pw_name, "group": user.pw_gid, "extra_groups": ()}


# --- What is asked of a layer, and of the server ----------------------------------------------------------------------


async def acquired(
    layer: PostgresPersistenceLayer, key: str = "key", owner: str | None = "ours", **options: Any
) -> Claimed | Blocked:
    now = time.time()
    record = claim_of(key, now=now, owner=owner, **{"lease_seconds": 50, "kept_seconds": 60} | options)
    return await layer.acquire(record, now=now)


async def claimed(
    layer: PostgresPersistenceLayer, key: str = "key", owner: str | None = "ours", **options: Any
) -> DataRecord:
    answer = await acquired(layer, key, owner, **options)
    assert isinstance(answer, Claimed)
    return answer.record


async def completed(layer: PostgresPersistenceLayer, claim: DataRecord, text: str = '{"paid": true}') -> bool:
    now = time.time()
    return await layer.complete(completed_of(claim, now=now, response_data=text, kept_seconds=60), now=now)


@contextlib.asynccontextmanager
async def connected(url: str, **options: Any) -> AsyncGenerator[asyncpg.Connection]:
    """Give a connection that sees what is stored."""
    connection = await asyncpg.connect(url, **options)
    try:
        yield connection
    finally:
        await connection.close()


async def make_database(server: PostgresServer, name: str) -> str:
    """Make an empty database; return its URL."""
    async with connected(server.url) as connection:
        await connection.execute(f'DROP DATABASE IF EXISTS "{name}" WITH (FORCE)')
        await connection.execute(f'CREATE DATABASE "{name}"')
    return server.url.replace("/postgres?", f"/{name}?")


@contextlib.asynccontextmanager
async def failing(
    client: Any, state: str, *, times: int = 1_000_000, statement: str = "PERFORM 1"
) -> AsyncGenerator[None]:
    """Let the server answer an error to the next statements that write records; there must be some."""
    await client.execute(
        f"""
        CREATE SEQUENCE failures;
        CREATE FUNCTION fail() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN
            IF nextval('failures') <= {times} THEN
                {statement};
                RAISE EXCEPTION 'for a test' USING ERRCODE = '{state}';
            END IF;
            RETURN NEW;
        END $$;
        CREATE TRIGGER fail BEFORE INSERT OR UPDATE ON aidem_records FOR EACH ROW EXECUTE FUNCTION fail();
        """
    )
    try:
        yield
        assert await client.fetchval("SELECT is_called FROM failures"), "nothing was written, so nothing failed"
    finally:
        await client.execute("DROP FUNCTION fail CASCADE; DROP SEQUENCE failures")


async def until(has_happened: Any) -> None:
    async with asyncio.timeout(START_SECONDS):
        while not await has_happened():  # noqa: ASYNC110 - it happens in another process
            await asyncio.sleep(POLL_SECONDS)
