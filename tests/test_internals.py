"""The page on how aidem is built says what is there: rooms, phases, and the way of a call through the modules."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Awaitable, Callable, Iterable
from enum import Enum
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import anyio.to_thread
import pytest

import aidem
from aidem import idempotent_function, sync
from aidem._engine.call import STEPS, Answer, Phase
from aidem._http.states import TRANSITIONS, Action, Event, State
from aidem._runtime import background_loop
from aidem.asgi import IdempotencyMiddleware
from aidem.persistence.memory import MemoryPersistenceLayer

Kind = TypeVar("Kind", bound=Enum)

ROOT = Path(__file__).parents[1]
PACKAGE = Path(aidem.__file__).parent
PAGE = (ROOT / "docs" / "internals.md").read_text(encoding="utf-8")


def section(title: str) -> str:
    """Return the text below a heading, up to the next one."""
    [text] = re.findall(rf"^##+ {title}$(.*?)(?=^##|\Z)", PAGE, re.MULTILINE | re.DOTALL)
    return str(text)


def lines_of_rooms() -> list[list[str]]:
    [listing] = re.findall(r"```text\naidem/\n(.*?)```", section("Rooms"), re.DOTALL)
    return [line.split() for line in listing.splitlines()]


def test_the_rooms_are_the_listing_of_the_package() -> None:
    there = {path.name + "/" * path.is_dir() for path in PACKAGE.iterdir()}
    named = {room for line in lines_of_rooms() for room in line}
    assert named == there - {"__init__.py", "__pycache__/", "py.typed"}


def test_the_order_of_the_rooms_is_the_one_that_import_linter_holds() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"][
        "contracts"
    ]
    [rooms] = [contract for contract in contracts if contract.get("containers") == ["aidem"]]
    named = [sorted(room.removesuffix("/").removesuffix(".py") for room in line) for line in lines_of_rooms()]
    assert named == [sorted(layer.split(" | ")) for layer in rooms["layers"]]


def test_every_module_that_contributors_are_sent_to_exists() -> None:
    pages = [PAGE, (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")]
    named = {path for page in pages for path in re.findall(r"`((?:aidem|tests|docs)/[\w/.-]+)`", page)}
    assert named
    assert {path for path in named if not (ROOT / path).exists()} == set()


def test_the_table_of_steps_has_every_phase() -> None:
    headers = re.findall(r"^\| step \|(.*)\|$", section("Phases and steps"), re.MULTILINE)
    assert [phase.strip() for header in headers for phase in header.split("|")] == [phase.name for phase in Phase]


def test_the_table_of_a_response_is_the_one_that_the_code_follows() -> None:
    rows = re.findall(r"^\| (`[A-Z_`, ]+) \| (.*?) \| (.*?) \| (.*?) \|$", section("HTTP"), re.MULTILINE)
    told: dict[tuple[State, Event], tuple[Action, State]] = {}
    for states, what_happens, action, then in rows:
        for state in named_in(states, State):
            events = named_in(what_happens, Event)
            if what_happens == "any other":
                events = [event for event in Event if (state, event) not in told and event is not Event.LEASE_ENDING]
            [next_state] = [state] if then == "the same" else named_in(then, State)
            told |= {(state, event): (named_in(action, Action)[0], next_state) for event in events}
    assert told == TRANSITIONS


def named_in(cell: str, kind: type[Kind]) -> list[Kind]:
    return [kind[name] for name in re.findall(r"`([A-Z_]+)`", cell)]


def test_the_table_of_steps_is_the_one_that_calls_follow() -> None:
    rows = re.findall(r"^\| `(\w+)` \|(.*)\|$", section("Phases and steps"), re.MULTILINE)
    assert rows
    answers = {answer.value: answer for answer in Answer}
    told: dict[str, tuple[Answer, ...]] = {}  # the table is in two parts, one below the other
    for step, row in rows:
        told[step] = told.get(step, ()) + tuple(answers.get(cell.strip(), Answer.TAKEN) for cell in row.split("|"))
    assert told == STEPS


# --- Helpers used once ----------------------------------------------------------------------------------------------

MOST_HELPERS_USED_ONCE = 90


def helpers_used_once(sources: Iterable[str]) -> list[str]:
    """Return the private functions and methods that are named in one place, which calls them.

    Some could not be written where they are used, and are left out: coroutines that run as tasks, what a lambda calls
    for whom it is handed to, what several classes define, and what a decorator keeps the results of.
    """
    defined: dict[str, list[ast.FunctionDef | ast.AsyncFunctionDef]] = {}
    uses: dict[str, list[tuple[ast.AST, ast.AST]]] = {}
    for source in sources:
        tree = ast.parse(source)
        parents = {child: parent for parent in ast.walk(tree) for child in ast.iter_child_nodes(parent)}
        for node in ast.walk(tree):
            match node:
                case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                    defined.setdefault(name, []).append(node)
                case ast.Name(id=name) | ast.Attribute(attr=name):
                    call = parents[node]
                    is_called = isinstance(call, ast.Call) and call.func is node
                    uses.setdefault(name, []).append((call, parents[call]) if is_called else (node, call))
                case _:
                    pass
    return [name for name, found in defined.items() if is_used_once(name, found, uses.get(name, []))]


def is_used_once(
    name: str, defined: list[ast.FunctionDef | ast.AsyncFunctionDef], uses: list[tuple[ast.AST, ast.AST]]
) -> bool:
    if not name.startswith("_") or name.startswith("__") or len(defined) > 1 or len(uses) != 1:
        return False
    [function], [(use, within)] = defined, uses
    if not isinstance(use, ast.Call) or isinstance(within, ast.Lambda) or function.decorator_list:
        return False
    return isinstance(function, ast.FunctionDef) or isinstance(within, ast.Await)


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("def _once(): ...\n_once()", ["_once"]),
        ("class A:\n def _once(self): ...\n def a(self): self._once()", ["_once"]),
        ("async def _awaited(): ...\nasync def a(): await _awaited()", ["_awaited"]),
        ("def public(): ...\npublic()", []),
        ("class A:\n def __init__(self): ...\nA().__init__()", []),
        ("def _unused(): ...", []),
        ("def _twice(): ...\n_twice()\n_twice()", []),
        ("def _recursive(): _recursive()\n_recursive()", []),
        ("def _passed(): ...\nprint(_passed)", []),
        ("def _passed(a): ...\nprint(lambda: _passed(1))", []),
        ("async def _task(): ...\ncreate_task(_task())", []),
        ("class A:\n def _override(self): ...\nclass B(A):\n def _override(self): ...\nB()._override()", []),
        ("@cache\ndef _cached(): ...\n_cached()", []),
    ],
)
def test_a_helper_used_once_is_one_that_could_be_written_where_it_is_called(source: str, found: list[str]) -> None:
    assert helpers_used_once([source]) == found


def test_few_helpers_are_used_once() -> None:
    found = helpers_used_once(path.read_text(encoding="utf-8") for path in sorted(PACKAGE.rglob("*.py")))
    assert len(found) <= MOST_HELPERS_USED_ONCE, (
        f"{len(found)} private functions are called in one place only; at most {MOST_HELPERS_USED_ONCE} may be. Write "
        f"what one does where it is called, unless its name says more than its body: {', '.join(found)}"
    )


# --- The way of a call ----------------------------------------------------------------------------------------------


@pytest.fixture
def _still_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stop the clock of the machine: a layer makes another record where a millisecond has passed since the call."""
    monkeypatch.setattr("time.time", lambda: 1_700_000_000.0)


class Walk:
    """What happens between the files of aidem while a call runs.

    A call of a function of aidem from another file of aidem is a *switch of file*: whoever reads along turns to
    another file there. Functions of others that stand between the two, such as asyncio's, are looked through. Returns
    are not counted, nor calls of what is written in C.

    Attributes:
        modules: Those that are entered, in the order in which each is entered for the first time.
        switches: How often a function in another file is called.
    """

    def __init__(self) -> None:
        self.modules: list[str] = []
        self.switches = 0

    def __call__(self, frame: FrameType, event: str, _: Any) -> None:
        module = module_of(frame)
        if event != "call" or module is None:
            return
        if module not in self.modules:
            self.modules.append(module)
        caller = frame.f_back
        while caller is not None and module_of(caller) is None:
            caller = caller.f_back
        if caller is not None and module_of(caller) != module:
            self.switches += 1


def module_of(frame: FrameType) -> str | None:
    """Return the module of aidem that a function is in; None: it is somebody else's."""
    path = Path(frame.f_code.co_filename)
    return path.relative_to(PACKAGE).as_posix() if path.is_relative_to(PACKAGE) else None


async def walk_of(call: Callable[[], Awaitable[Any]]) -> Walk:
    """Return the walk of a call whose function has been called before with another key."""
    walk = Walk()
    sys.setprofile(walk)
    try:
        await call()
    finally:
        sys.setprofile(None)
    return walk


async def walk_of_async() -> Walk:
    @idempotent_function(persistence_store=MemoryPersistenceLayer())
    async def charge(order_id: str) -> dict[str, int]:
        return {"charged": 42}

    await charge("o-1")
    return await walk_of(lambda: charge("o-2"))


async def walk_of_http() -> Walk:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "http.response.start", "status": 201, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"{}"})

    middleware = IdempotencyMiddleware(
        app, key_prefix="payments", scope=None, persistence_store=MemoryPersistenceLayer()
    )

    async def post(key: bytes) -> None:
        async def receive() -> Any:
            return {"type": "http.request", "body": b"{}"}

        async def send(message: Any) -> None: ...

        headers = [(b"idempotency-key", key), (b"content-type", b"application/json")]
        scope = {"type": "http", "method": "POST", "path": "/payments", "query_string": b"", "headers": headers}
        await middleware(scope, receive, send)

    await post(b'"o-1"')
    return await walk_of(lambda: post(b'"o-2"'))


def walk_of_sync() -> Walk:
    @sync.idempotent_function(persistence_store=MemoryPersistenceLayer())
    def charge(order_id: str) -> dict[str, int]:
        return {"charged": 42}

    async def profile(walk: Walk | None) -> None:
        sys.setprofile(walk)

    walk = Walk()
    charge("o-1")
    background_loop.run(partial(profile, walk))
    walk.modules.clear()
    sys.setprofile(walk)
    try:
        charge("o-2")
    finally:
        sys.setprofile(None)
        background_loop.run(partial(profile, None))
        sync.close()
    return walk


@pytest.mark.usefixtures("_still_clock")
@pytest.mark.parametrize("front", ["Async", "Sync", "HTTP"])
async def test_the_walks_name_every_module_that_a_call_enters_in_order(front: str) -> None:
    walks: dict[str, Callable[[], Awaitable[Walk]]] = {
        "Async": walk_of_async,
        "Sync": partial(anyio.to_thread.run_sync, walk_of_sync),
        "HTTP": walk_of_http,
    }
    steps = re.findall(r"^\| (`[\w/., `]+\.py`) \|", section(front), re.MULTILINE)
    walk = await walks[front]()
    assert [module.strip("`") for step in steps for module in step.split(", ")] == walk.modules


@pytest.mark.usefixtures("_still_clock")
async def test_a_reader_follows_a_first_call_through_few_files() -> None:
    walk = await walk_of_async()
    assert len(walk.modules) <= 12
    assert walk.switches <= 34


@pytest.mark.usefixtures("_still_clock")
async def test_a_reader_follows_a_request_through_few_files() -> None:
    walk = await walk_of_http()
    assert len(walk.modules) <= 18
    assert walk.switches <= 55
