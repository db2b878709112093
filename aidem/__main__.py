"""The command `python -m aidem`, also `aidem`: for operators who look at keys and resolve them.

Exit codes: 0 done, 1 refused or not found, 2 wrong usage, 3 the store cannot be reached or used.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib
import json
import logging
import os
import re
import sys
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from aidem import operations
from aidem._api.keys import idempotency_key
from aidem._distribution import __version__
from aidem._http.response import StoredResponse
from aidem._rules.lifecycle import lease_end
from aidem.exceptions import IdempotencyError, IdempotencyPersistenceLayerError, IdempotencyUsageError
from aidem.operations import Found, OperationRefusedError, RecordState
from aidem.persistence import PersistenceLayer, open_persistence_layer

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable, Generator, Sequence

    from aidem._rules.record import DataRecord

DONE, REFUSED, WRONG_USAGE, STORE_FAILED = 0, 1, 2, 3
INTERRUPTED: Final = 130

MILLISECONDS: Final = 1000
PROGRESS_SECONDS: Final = 1.0
"""How long a scan takes before its progress is shown, and how often it is shown then."""


class OutputError(Exception):
    """The output cannot be written; its cause says why."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Do what the arguments say; return the exit code."""
    try:
        return _run(sys.argv[1:] if arguments is None else list(arguments))
    except OutputError as error:
        _drop(sys.stdout)
        if isinstance(error.__cause__, BrokenPipeError):  # what read the output has ended, as `head` does
            return DONE
        return _failed(REFUSED, error)
    except KeyboardInterrupt:
        return INTERRUPTED
    except (IdempotencyError, ImportError) as error:
        if isinstance(error, OperationRefusedError):
            return _failed(REFUSED, error)
        is_of_store = isinstance(error, IdempotencyPersistenceLayerError | ImportError)
        return _failed(STORE_FAILED if is_of_store else WRONG_USAGE, error)


def _run(arguments: list[str]) -> int:
    for name in ("stdout", "stderr"):
        stream: Any = getattr(sys, name)
        if stream is None:  # closed by the shell: the next file that is opened must not take its place
            setattr(sys, name, Path(os.devnull).open("w", encoding="utf-8"))  # noqa: SIM115 - until the process ends
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a note that the terminal has no letters for
    parser = _parser()
    try:
        if not all(map(_is_text, arguments)):
            parser.error("an argument is not text in the encoding of this terminal")
        options = parser.parse_args(arguments)
    except SystemExit as left:
        with _writing():
            sys.stdout.flush()  # what --help prints
        return int(str(left.code or DONE))
    code: int = options.run(options)
    return code


def _is_text(argument: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in argument)


def _failed(code: int, error: Exception) -> int:
    """Say why nothing was done, on stderr; return the exit code."""
    try:
        sys.stderr.write("".join(f"{_shown(line)}\n" for line in f"aidem: {error}".splitlines()))
        sys.stderr.flush()
    except OSError:
        _drop(sys.stderr)
    return code


def _drop(stream: Any) -> None:
    """Have what is left in the buffer of a stream, which cannot be written, go nowhere when the process ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


# --- The command line -------------------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """Takes options by their full names: `--show` is not a way to write `--show-results`."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)


def _parser() -> Parser:
    parser = Parser(prog="aidem", description="Look at idempotency keys, and resolve them.")
    parser.add_argument("--version", action="version", version=f"aidem {__version__}")
    store = Parser(add_help=False)
    for place, default in ((parser, os.environ.get("AIDEM_PERSISTENCE", "")), (store, argparse.SUPPRESS)):
        place.add_argument(
            "--store",
            metavar="STORE",
            default=default,
            help="URL of the persistence layer, or module:name of one. Default: AIDEM_PERSISTENCE",
        )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    _add_looking(commands, store)
    _add_changing(commands, store)
    return parser


def _add_looking(commands: Any, store: Parser) -> None:
    shown = Parser(add_help=False)
    shown.add_argument("--json", action="store_true", help="one JSON object a line")
    shown.add_argument("--show-results", action="store_true", help="also show what the functions returned")

    listing = commands.add_parser("list", parents=[store, shown], help="list records")
    states = listing.add_mutually_exclusive_group()
    for state in RecordState:
        name = state.value.replace(" ", "-")
        states.add_argument(f"--{name}", dest="state", action="store_const", const=state, help=f"only {state.value}")
    listing.add_argument("--prefix", default="", help="what the keys begin with")
    listing.add_argument("--limit", type=int, help="how many records at most")
    listing.set_defaults(run=_with_layer(_list))

    showing = commands.add_parser("show", parents=[store, shown], help="show the record of a key")
    showing.add_argument("key", metavar="KEY", type=_not_empty)
    showing.set_defaults(run=_with_layer(_show))

    making = commands.add_parser("key", help="print the key of a call, without calling")
    making.add_argument("function", metavar="MODULE:FUNCTION", help="a decorated function")
    making.add_argument("--args", type=_json, default=[], metavar="JSON", help="an array, or an object by name")
    making.add_argument("--key-prefix", help="as in another process: another Lambda function, or one run as __main__")
    making.set_defaults(run=_key)

    doctor = commands.add_parser("doctor", parents=[store], help="look for settings that endanger the promises")
    doctor.set_defaults(run=_with_layer(_doctor))


def _add_changing(commands: Any, store: Parser) -> None:
    claim = Parser(add_help=False)
    claim.add_argument("key", metavar="KEY", type=_not_empty)
    claim.add_argument("--force", action="store_true", help="also a claim that may be running")
    claim.add_argument(
        "--max-clock-skew",
        type=float,
        default=0.0,
        metavar="SECONDS",
        help="added to a lease, if clocks of callers may be behind; for DynamoDB. Default: 0",
    )

    resolving = commands.add_parser(
        "resolve", parents=[store, claim], help="the effect has happened: record its outcome"
    )
    outcome = resolving.add_mutually_exclusive_group(required=True)
    outcome.add_argument("--result", type=_json, metavar="JSON", default=..., help="what the function returned")
    outcome.add_argument("--unavailable", action="store_true", help="the result is not known")
    outcome.add_argument("--status", type=int, help="of an HTTP request: the status of its response")
    resolving.add_argument("--header", action="append", default=[], type=_header, metavar="NAME: VALUE")
    resolving.add_argument("--body", default="", help="of an HTTP request: the body of its response")
    resolving.add_argument("--kept", type=float, default=3600, metavar="SECONDS", help="Default: 3600")
    resolving.set_defaults(run=_with_layer(_resolve))

    releasing = commands.add_parser(
        "release", parents=[store, claim], help="the effect has not happened and will not: the next call runs"
    )
    releasing.set_defaults(run=_with_layer(_release))

    forgetting = commands.add_parser("forget", parents=[store], help="drop records, outcomes too")
    which = forgetting.add_mutually_exclusive_group(required=True)
    which.add_argument("key", metavar="KEY", type=_not_empty, nargs="?")
    which.add_argument("--prefix", type=_not_empty, help="all records whose keys begin so")
    forgetting.add_argument("--yes", action="store_true", help="do not only say how many records there are")
    forgetting.add_argument("--force", action="store_true", help="also a claim that may be running")
    forgetting.set_defaults(run=_with_layer(_forget))

    purging = commands.add_parser("purge", parents=[store], help="remove expired records")
    purging.set_defaults(run=_with_layer(_purge))
    creating = commands.add_parser("create-table", parents=[store], help="make the table or file")
    creating.set_defaults(run=_with_layer(_create_table, makes=True))


def _json(text: str) -> Any:
    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not in JSON")

    try:
        return json.loads(text, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise argparse.ArgumentTypeError(f"is no JSON: {error}") from error


def _header(text: str) -> tuple[bytes, bytes]:
    name, colon, value = text.partition(":")
    if not colon:
        raise argparse.ArgumentTypeError("is no header; write NAME: VALUE")
    try:
        return name.strip().encode("ascii"), value.strip().encode("latin-1")
    except UnicodeEncodeError as error:
        raise argparse.ArgumentTypeError("is no header: it has letters that headers cannot have") from error


def _not_empty(text: str) -> str:
    """Refuse what a variable without a value leaves: an empty prefix is that of every record."""
    if not text:
        raise argparse.ArgumentTypeError("must not be empty")
    return text


# --- The store --------------------------------------------------------------------------------------------------------

Options = argparse.Namespace


def _with_layer(
    command: Callable[[PersistenceLayer, Options], Awaitable[int]], *, makes: bool = False
) -> Callable[[Options], int]:
    async def run(layer: PersistenceLayer, options: Options) -> int:
        try:
            async with contextlib.aclosing(layer):
                return await command(layer, options)
        except (IdempotencyError, OutputError):
            raise
        except Exception as error:
            raise IdempotencyPersistenceLayerError(
                f"{type(layer).__name__} raised {type(error).__name__}: {error}"
            ) from error

    return lambda options: asyncio.run(run(_layer(options.store, makes=makes), options))


def _layer(store: str, *, makes: bool) -> PersistenceLayer:
    if not store:
        raise IdempotencyUsageError("no store is named; give --store, or set AIDEM_PERSISTENCE")
    if store.partition("?")[0] == "memory://":
        raise IdempotencyUsageError("memory:// is the memory of another process, which cannot be looked into")
    layer = open_persistence_layer(store) if "://" in store else _imported(store)
    if not isinstance(layer, PersistenceLayer):
        raise IdempotencyUsageError(f"{store} is no persistence layer")
    file: Any = layer if hasattr(layer, "holds_records") else None
    if file is not None and not makes and not file.holds_records():
        lack = "has no tables of records" if file.path.exists() else "does not exist"
        raise IdempotencyPersistenceLayerError(f"{file.path} {lack}; make it with `aidem create-table`")
    return layer


def _imported(name: str) -> Any:
    if not re.fullmatch(r"[\w.]+:[\w.]+", name):  # it may be a URL with a slip in it, and with a password
        raise IdempotencyUsageError("this is no URL, which has ://, and names nothing to import; write module:name")
    module, _, attributes = name.partition(":")
    sys.path.insert(0, str(Path.cwd()))
    try:
        found: Any = importlib.import_module(module)
        for attribute in attributes.split("."):
            found = getattr(found, attribute)
    except (Exception, SystemExit) as error:
        raise IdempotencyUsageError(f"{name} cannot be imported: {type(error).__name__}: {error}") from error
    return found


# --- Commands ---------------------------------------------------------------------------------------------------------


async def _list(layer: PersistenceLayer, options: Options) -> int:
    async with _progress() as progress:
        async for found in operations.find(
            layer, prefix=options.prefix, state=options.state, limit=options.limit, seen=progress.read
        ):
            progress.erase()
            _print(found, options)
    return DONE


async def _show(layer: PersistenceLayer, options: Options) -> int:
    found = await operations.look(layer, options.key)
    if found is None:
        raise OperationRefusedError(f"there is no record of {options.key}", key=options.key)
    _print(found, options)
    return DONE


def _key(options: Options) -> int:
    function, arguments = _imported(options.function), options.args
    if not isinstance(arguments, dict | list):
        raise IdempotencyUsageError("--args must be an array or an object")
    try:
        if isinstance(arguments, dict):
            key = idempotency_key(function, **arguments)
        else:
            key = idempotency_key(function, *arguments)
    except IdempotencyError:
        raise
    except Exception as error:
        raise IdempotencyUsageError(f"these arguments have no key: {type(error).__name__}: {error}") from error
    if options.key_prefix is not None:
        key = f"{options.key_prefix}#{key.rpartition('#')[2]}"
    _write(key)
    return DONE


async def _resolve(layer: PersistenceLayer, options: Options) -> int:
    result = None if options.result is ... else options.result
    if options.status is not None:
        result = StoredResponse(options.status, options.header, options.body.encode())
    elif options.header or options.body:
        raise IdempotencyUsageError("--header and --body need --status")
    await operations.resolve(
        layer,
        options.key,
        result=result,
        unavailable=options.unavailable,
        kept_seconds=options.kept,
        force=options.force,
        max_clock_skew_seconds=options.max_clock_skew + await _ahead_seconds(layer),
    )
    _write("resolved: later calls get this outcome")
    return DONE


async def _ahead_seconds(layer: PersistenceLayer) -> float:
    """Return how far the clock here is ahead of the store's, if it judges leases; else 0."""
    ahead = getattr(layer, "clock_ahead_seconds", None)
    return 0.0 if ahead is None else float(await ahead())


async def _release(layer: PersistenceLayer, options: Options) -> int:
    skew_seconds = options.max_clock_skew + await _ahead_seconds(layer)
    await operations.release(layer, options.key, force=options.force, max_clock_skew_seconds=skew_seconds)
    _write("released: the next call runs")
    return DONE


async def _forget(layer: PersistenceLayer, options: Options) -> int:
    forget = partial(operations.forget, force=options.force, max_clock_skew_seconds=await _ahead_seconds(layer))
    if options.prefix is None:
        await forget(layer, options.key)
        _write("forgotten: the next call runs")
        return DONE
    async with _progress() as progress:
        found = operations.find(layer, prefix=options.prefix, seen=progress.read)
        keys = [each.record.idempotency_key async for each in found]
    if not options.yes:
        _write(f"{_counted(len(keys), 'record')} with this prefix; add --yes to drop what is not running")
        return REFUSED
    forgotten = refused = 0
    for key in keys:
        try:
            await forget(layer, key)
            forgotten += 1
        except OperationRefusedError as error:
            if await layer.get(key) is not None:  # else somebody else has dropped it
                refused += 1
                _failed(REFUSED, error)
    _write(f"{_counted(forgotten, 'record')} forgotten")
    return REFUSED if refused else DONE


async def _purge(layer: PersistenceLayer, _options: Options) -> int:
    _write(f"{_counted(await operations.purge(layer), 'expired record')} removed")
    return DONE


async def _create_table(layer: PersistenceLayer, _options: Options) -> int:
    create = getattr(layer, "create_table", None)
    await (layer.open() if create is None else create())
    _write("ready")
    return DONE


async def _doctor(layer: PersistenceLayer, _options: Options) -> int:
    logging.getLogger("aidem").addHandler(logging.NullHandler())  # what layers log when they are opened is in it
    diagnosis = await operations.diagnose(layer)
    _write(f"aidem {__version__}, {type(layer).__name__}: it can be reached and used")
    for name, fact in diagnosis.facts.items():
        _write(f"    {name}: {fact}")
    for problem in diagnosis.problems:
        _write(f"problem: {problem}")
    return REFUSED if diagnosis.problems else DONE


# --- Output -----------------------------------------------------------------------------------------------------------


def _print(found: Found, options: Options) -> None:
    record, state = found
    facts = _facts(record, state)
    if options.show_results:
        facts["result"] = record.response_data
    if options.json:
        _write(json.dumps(facts))
        return
    _write(record.idempotency_key)
    _write("    " + _sentence(state, facts))
    if operations.is_of_request(record):
        _write("    an HTTP request")
    for name in ("note", "outcome", "result"):
        if facts.get(name) is not None:
            _write(f"    {name}: {facts[name]}")


def _facts(record: DataRecord, state: RecordState) -> dict[str, Any]:
    end = lease_end(record)
    lease_ends_at = operations.instant(end / MILLISECONDS) if end else None  # 0 stands for a claim that was given up
    expiry = record.expiry_timestamp
    return {
        "key": record.idempotency_key,
        "state": state.value,
        "status": record.status.value,
        "fence": record.fence,
        "owner": record.owner,
        "in_doubt_since": lease_ends_at if state is RecordState.IN_DOUBT else None,
        "lease_ends_at": lease_ends_at,
        "expires_at": None if expiry is None else operations.instant(expiry),
        "outcome": None if record.outcome is None else record.outcome.value,
        "payload_hash": record.payload_hash,
        "note": record.note,
    }


def _sentence(state: RecordState, facts: dict[str, Any]) -> str:
    """Return what an operator wants to know first, in less than 80 columns."""
    expiry = facts["expires_at"] or "never"
    if state is RecordState.IN_DOUBT:
        return f"in doubt since {facts['in_doubt_since'] or 'its owner gave it up'}, runs again after {expiry}"
    if state is RecordState.RUNNING:
        return f"running, lease until {facts['lease_ends_at'] or expiry}"
    if state is RecordState.LAPSED:
        return f"lapsed at {facts['lease_ends_at']}: runs at the next call"
    return f"{state.value}, kept until {expiry}"


def _counted(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


@contextlib.contextmanager
def _writing() -> Generator[None]:
    try:
        yield
    except OSError as error:
        raise OutputError(f"the output cannot be written: {error.strerror}") from error


def _write(text: str) -> None:
    with _writing():
        sys.stdout.write(f"{_shown(text)}\n")
        sys.stdout.flush()  # somebody may read it line by line


def _shown(text: str) -> str:
    """Return a text without what a terminal would take for a command."""
    return "".join(character if character.isprintable() else ascii(character)[1:-1] for character in text)


# --- Progress ---------------------------------------------------------------------------------------------------------


class _Progress:
    """A line on stderr that says how far a scan is; erased before anything else is written."""

    def __init__(self) -> None:
        self._began_at = time.monotonic()
        self._count = 0
        self._is_shown = False

    def read(self, _record: DataRecord) -> None:
        """Count a record."""
        self._count += 1

    async def show(self) -> None:
        """Show it again and again, until this is cancelled."""
        while True:
            await asyncio.sleep(PROGRESS_SECONDS)
            seconds = time.monotonic() - self._began_at
            self._is_shown = True
            self._draw(f"\r{_counted(self._count, 'record')} read in {seconds:.0f} s\x1b[K")

    def erase(self) -> None:
        """Take the line away."""
        if self._is_shown:
            self._is_shown = False
            self._draw("\r\x1b[K")

    def _draw(self, text: str) -> None:
        with contextlib.suppress(OSError):  # the terminal has gone; the command need not
            sys.stderr.write(text)
            sys.stderr.flush()


@contextlib.asynccontextmanager
async def _progress() -> AsyncGenerator[_Progress]:
    """Show the progress of a scan that takes long, where a person reads stderr."""
    progress = _Progress()
    if not sys.stderr.isatty() or os.environ.get("TERM", "dumb") == "dumb":  # which cannot erase a line
        yield progress
        return
    task = asyncio.ensure_future(progress.show())
    try:
        yield progress
    finally:
        task.cancel()
        progress.erase()


if __name__ == "__main__":
    sys.exit(main())
