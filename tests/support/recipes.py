"""The programs of the page "Queues, webhooks, agents", run as they stand there, with a bank of the tests."""

from __future__ import annotations

import asyncio
import os
import re
import sys
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "recipes.md"
DEADLINE_SECONDS = 25.0
PROGRAMS: dict[str, str] = dict(
    re.findall(r'^```py title="([\w.]+)"\n(.*?)^```$', PAGE.read_text("utf-8"), re.MULTILINE | re.DOTALL)
)
# The bank of a program that runs in a process of its own: a charge is a line in a file, `pid order key`, and takes for
# ever while the file `hold` is there.
BANK = """
import asyncio, os, time
from pathlib import Path

DIRECTORY = Path(__file__).parent

def record(order_id, key):
    with (DIRECTORY / "charges").open("a") as charges:
        charges.write(f"{os.getpid()} {order_id} {key}\\n")
"""
ASYNC_BANK = (
    BANK
    + """
async def charge(order_id, cents, key=""):
    record(order_id, key)
    while (DIRECTORY / "hold").exists():
        await asyncio.sleep(0.01)
    return f"charged {cents}"
"""
)
BLOCKING_BANK = (
    BANK
    + """
def charge(order_id, cents, key=""):
    record(order_id, key)
    while (DIRECTORY / "hold").exists():
        time.sleep(0.01)
    return f"charged {cents}"
"""
)


class BankIsDownError(Exception):
    """What the bank raises for the order `refused`."""


@dataclass
class Bank:
    """The bank of a program that runs in the process of the test; it answers when it is open."""

    charges: list[str] = field(default_factory=list)
    keys: set[str] = field(default_factory=set)
    is_open: asyncio.Event = field(default_factory=asyncio.Event)
    has_charged: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.is_open.set()

    async def charge(self, order_id: str, cents: int, key: str = "") -> str:
        await asyncio.sleep(0)  # the request is on its way
        if order_id == "refused":
            raise BankIsDownError
        self.charges.append(order_id)
        self.keys.add(key)
        self.has_charged.set()
        await self.is_open.wait()
        return f"charged {cents}"

    async def lose(self, execution: Coroutine[Any, Any, object]) -> None:
        """Cut an execution off behind its charge: under `"raise"` its key is in doubt, as if its process was lost."""
        self.is_open.clear()
        lost = asyncio.create_task(execution)
        await self.has_charged.wait()
        lost.cancel()
        await asyncio.wait([lost])
        self.is_open.set()

    def clear(self) -> None:
        self.charges.clear()
        self.keys.clear()


def load(name: str, bank: Bank, monkeypatch: pytest.MonkeyPatch, **environment: str) -> Any:
    """Run a program of the page in this process, at the lines that it has on the page, and return its module."""
    for variable, value in ({"AIDEM_PERSISTENCE": "memory://"} | environment).items():
        monkeypatch.setenv(variable, value)
    code = PROGRAMS[name]
    lines_before = PAGE.read_text("utf-8").partition(code)[0].count("\n")
    module: Any = ModuleType(name.removesuffix(".py"))
    # An import looks for a module here, and the program imports its bank.
    monkeypatch.setitem(sys.modules, "bank", bank)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(compile("\n" * lines_before + code, PAGE, "exec", dont_inherit=True), module.__dict__)
    return module


async def until(has_happened: Callable[[], Awaitable[bool]]) -> None:
    """Wait for what a broker or another process does; asking them often would cost more than it saves."""
    async with asyncio.timeout(DEADLINE_SECONDS):
        while not await has_happened():  # noqa: ASYNC110 - it happens in another process
            await asyncio.sleep(0.05)


@dataclass
class Directory:
    """A program of the page as a file, with a bank beside it."""

    path: Path
    settings: dict[str, str]

    @classmethod
    def of(cls, path: Path, name: str, bank: str, **settings: str) -> Directory:
        (path / name).write_text(PROGRAMS[name])
        (path / "bank.py").write_text(bank)
        (path / "charges").touch()
        return cls(path, settings)

    @property
    def environment(self) -> dict[str, str]:
        paths = os.pathsep.join([str(self.path), str(PAGE.parents[1])])
        return os.environ | self.settings | {"PYTHONPATH": paths}

    def charges(self) -> list[tuple[int, str, str]]:
        """Return who charged what under which key, in order."""
        lines = (self.path / "charges").read_text().splitlines()
        return [(int(pid), order, key) for pid, order, key in (line.split(" ") for line in lines)]

    def hold(self) -> None:
        (self.path / "hold").touch()

    def go_on(self) -> None:
        (self.path / "hold").unlink()

    def log(self) -> str:
        return (self.path / "log").read_text()
