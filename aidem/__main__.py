"""The command `python -m aidem`, also `aidem`: for operators who look at keys and resolve them.

Exit codes: 0 done, 1 refused or not found, 2 wrong usage, 3 the store cannot be reached or used.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import datetime
import importlib
import json
import logging
import os
import sys
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
    from collections.abc import Awaitable, Callable, Sequence

    from aidem._rules.record import DataRecord

DONE, REFUSED, WRONG_USAGE, STORE_FAILED = 0, 1, 2, 3
INTERRUPTED: Final = 130

MILLISECONDS: Final = 1000
CLOCKS_AGREE_SECONDS: Final = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Do what the arguments say; return the exit code."""
    options = _parser().parse_args(arguments)
    try:
        code: int = options.run(options)
        sys.stdout.flush()
    except BrokenPipeError:  # what read the output has ended, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE
    except KeyboardInterrupt:
        return INTERRUPTED
    except OperationRefusedError as error:
        return _failed(REFUSED, error)
    except (IdempotencyPersistenceLayerError, ImportError) as error:
        return _failed(STORE_FAILED, error)
    except IdempotencyError as error:
        return _failed(WRONG_USAGE, error)
    return code


def _failed(code: int, error: Exception) -> int:
    sys.stderr.write(f"aidem: {_shown(str(error))}\n")
    return code


# --- The command line -------------------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="aidem", description="Look at idempotency keys, and resolve them.")
    parser.add_argument("--version", action="version", version=f"aidem {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    store = argparse.ArgumentParser(add_help=False)
    store.add_argument(
        "--store",
        metavar="STORE",
        default=os.environ.get("AIDEM_PERSISTENCE", ""),
        help="URL of the persistence layer, or module:name of one. Default: AIDEM_PERSISTENCE",
    )
    _add_looking(commands, store)
    _add_resolving(commands, store)
    _add_dropping(commands, store)
    return parser


def _add_looking(commands: Any, store: argparse.ArgumentParser) -> None:
    shown = argparse.ArgumentParser(add_help=False)
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
    showing.add_argument("key", metavar="KEY")
    showing.set_defaults(run=_with_layer(_show))

    making = commands.add_parser("key", help="print the key of a call, without calling")
    making.add_argument("function", metavar="MODULE:FUNCTION", help="a decorated function")
    making.add_argument("--args", type=_json, default=[], metavar="JSON", help="an array, or an object by name")
    making.add_argument("--key-prefix", help="as in another process: another Lambda function, or one run as __main__")
    making.set_defaults(run=_key)

    doctor = commands.add_parser("doctor", parents=[store], help="look for settings that endanger the promises")
    doctor.set_defaults(run=_with_layer(_doctor))


def _add_resolving(commands: Any, store: argparse.ArgumentParser) -> None:
    claim = argparse.ArgumentParser(add_help=False)
    claim.add_argument("key", metavar="KEY")
    claim.add_argument("--force", action="store_true", help="also a claim that may be running")
    claim.add_argument(
        "--max-clock-skew",
        type=float,
        default=0.0,
        metavar="SECONDS",
        help="added to a lease before it has passed; DynamoDB has no clock of its own. Default: 0",
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


def _add_dropping(commands: Any, store: argparse.ArgumentParser) -> None:
    forgetting = commands.add_parser("forget", parents=[store], help="drop records, outcomes too")
    which = forgetting.add_mutually_exclusive_group(required=True)
    which.add_argument("key", metavar="KEY", nargs="?")
    which.add_argument("--prefix", help="all records whose keys begin so")
    forgetting.add_argument("--yes", action="store_true", help="do not only say how many records there are")
    forgetting.add_argument("--force", action="store_true", help="also a claim that may be running")
    forgetting.set_defaults(run=_with_layer(_forget))

    purging = commands.add_parser("purge", parents=[store], help="remove expired records")
    purging.set_defaults(run=_with_layer(_purge))
    creating = commands.add_parser("create-table", parents=[store], help="make the table or file")
    creating.set_defaults(run=_with_layer(_create_table, makes=True))


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"is no JSON: {error}") from error


def _header(text: str) -> tuple[bytes, bytes]:
    name, colon, value = text.partition(":")
    if not colon:
        raise argparse.ArgumentTypeError("is no header; write NAME: VALUE")
    return name.strip().encode("latin-1"), value.strip().encode("latin-1")


# --- The store --------------------------------------------------------------------------------------------------------

Options = argparse.Namespace


def _with_layer(
    command: Callable[[PersistenceLayer, Options], Awaitable[int]], *, makes: bool = False
) -> Callable[[Options], int]:
    async def run(layer: PersistenceLayer, options: Options) -> int:
        try:
            return await command(layer, options)
        finally:
            await layer.aclose()

    return lambda options: asyncio.run(run(_layer(options.store, makes=makes), options))


def _layer(store: str, *, makes: bool) -> PersistenceLayer:
    if not store:
        raise IdempotencyUsageError("no store is named; give --store, or set AIDEM_PERSISTENCE")
    if store == "memory://":
        raise IdempotencyUsageError("memory:// is the memory of another process, which cannot be looked into")
    layer = open_persistence_layer(store) if "://" in store else _imported(store)
    if not isinstance(layer, PersistenceLayer):
        raise IdempotencyUsageError(f"{store} is no persistence layer")
    path: Path | None = getattr(layer, "path", None)
    if path is not None and not makes and not path.exists():
        raise IdempotencyPersistenceLayerError(f"{path} does not exist; make it with `aidem create-table`")
    return layer


def _imported(name: str) -> Any:
    module, colon, attributes = name.partition(":")
    if not (module and colon and attributes):
        raise IdempotencyUsageError(f"{name!r} names nothing to import; write module:name")
    sys.path.insert(0, str(Path.cwd()))
    try:
        found: Any = importlib.import_module(module)
        for attribute in attributes.split("."):
            found = getattr(found, attribute)
    except (ImportError, AttributeError) as error:
        raise IdempotencyUsageError(f"{name} cannot be imported: {error}") from error
    return found


# --- Commands ---------------------------------------------------------------------------------------------------------


async def _list(layer: PersistenceLayer, options: Options) -> int:
    async for found in operations.find(layer, prefix=options.prefix, state=options.state, limit=options.limit):
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
    if isinstance(arguments, dict):
        key = idempotency_key(function, **arguments)
    elif isinstance(arguments, list):
        key = idempotency_key(function, *arguments)
    else:
        raise IdempotencyUsageError("--args must be an array or an object")
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
    keys = [found.record.idempotency_key async for found in operations.find(layer, prefix=options.prefix)]
    if not options.yes:
        _write(f"{len(keys)} records begin with this prefix; add --yes to drop them")
        return REFUSED
    refused = 0
    for key in keys:
        try:
            await forget(layer, key)
        except OperationRefusedError as error:
            refused += 1
            _failed(REFUSED, error)
    _write(f"{len(keys) - refused} records forgotten")
    return REFUSED if refused else DONE


async def _purge(layer: PersistenceLayer, _options: Options) -> int:
    _write(f"{await operations.purge(layer)} expired records removed")
    return DONE


async def _create_table(layer: PersistenceLayer, _options: Options) -> int:
    create = getattr(layer, "create_table", None)
    await (layer.open() if create is None else create())
    _write("ready")
    return DONE


async def _doctor(layer: PersistenceLayer, _options: Options) -> int:
    problems = list[str]()
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: problems.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("aidem")
    logger.addHandler(handler)
    try:
        await layer.open()
    finally:
        logger.removeHandler(handler)
    _write(f"aidem {__version__}, {type(layer).__name__}: it can be reached and used")
    ahead_seconds = await _ahead_seconds(layer)
    if ahead_seconds > CLOCKS_AGREE_SECONDS:
        problems.append(f"the clock of this machine is about {ahead_seconds:.0f} s ahead of the store's")
    for problem in problems:
        _write(f"problem: {problem}")
    return REFUSED if problems else DONE


# --- Output -----------------------------------------------------------------------------------------------------------


def _print(found: Found, options: Options) -> None:
    record, state = found
    result = {"result": record.response_data} if options.show_results else {}
    facts = _facts(record, state) | result
    if options.json:
        _write(json.dumps(facts))
        return
    _write(record.idempotency_key)
    _write("    " + _sentence(state, facts))
    for name in ("note", "outcome", "result"):
        if facts.get(name) is not None:
            _write(f"    {name}: {facts[name]}")


def _facts(record: DataRecord, state: RecordState) -> dict[str, Any]:
    end = lease_end(record)
    return {
        "key": record.idempotency_key,
        "state": state.value,
        "status": record.status.value,
        "fence": record.fence,
        "owner": record.owner,
        "in_doubt_since": _instant(end, MILLISECONDS) if state is RecordState.IN_DOUBT else None,
        "lease_ends_at": _instant(end, MILLISECONDS),
        "expires_at": _instant(record.expiry_timestamp, 1),
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


def _instant(number: int | None, unit: int) -> str | None:
    """Return an instant in UTC; None: there is none, or 0, which stands for a claim that was given up."""
    if not number:
        return None
    with contextlib.suppress(OverflowError, ValueError, OSError):
        instant = datetime.datetime.fromtimestamp(number // unit, tz=datetime.UTC)
        return instant.isoformat().replace("+00:00", "Z")
    return str(number)


def _write(text: str) -> None:
    sys.stdout.write(f"{_shown(text)}\n")


def _shown(text: str) -> str:
    """Return a text without what a terminal would take for a command."""
    return "".join(character if character.isprintable() else ascii(character)[1:-1] for character in text)


if __name__ == "__main__":
    sys.exit(main())
