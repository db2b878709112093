"""What is looked at when the layer is opened: the table, the rights to it, and settings that endanger records."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from aidem._runtime.clock import wall_clock
from aidem.exceptions import IdempotencyPersistenceConfigError
from aidem.persistence import Diagnosis
from aidem.persistence._diagnosis import clock_fact, clock_problems
from aidem.persistence.postgres import _errors
from aidem.persistence.postgres._statements import Statement
from aidem.persistence.postgres._table import COLUMNS

if TYPE_CHECKING:
    from aidem.persistence.postgres._table import Table

CHECK: Final = Statement(
    "aidem_check",
    """
SELECT c.oid IS NOT NULL,
    coalesce((
        SELECT string_agg(a.attname || ' ' || format_type(a.atttypid, NULL), ', ')
        FROM pg_attribute a WHERE a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
    ), ''),
    EXISTS (
        SELECT FROM pg_index i JOIN pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = i.indkey[0]
        WHERE i.indrelid = c.oid AND i.indisunique AND i.indisvalid AND i.indpred IS NULL AND i.indnkeyatts = 1
            AND a.attname = 'id'
    ),
    coalesce(bool_and(has_table_privilege(c.oid, p)), true),
    pg_is_in_recovery(),
    c.relpersistence = 'p',
    current_setting('fsync') = 'on',
    current_setting('synchronous_commit') <> 'off'
FROM unnest(ARRAY['SELECT', 'INSERT', 'UPDATE', 'DELETE']) p
LEFT JOIN pg_class c ON c.oid = to_regclass($1::text)
GROUP BY c.oid, c.relpersistence
""",
)

LOOK: Final = Statement(
    "aidem_look",
    """
SELECT (extract(epoch FROM clock_timestamp()) * 1000)::bigint,
    (SELECT count(*) FROM pg_stat_replication),
    coalesce(array_to_string(c.reloptions, ', '), 'none'),
    pg_size_pretty(pg_total_relation_size(c.oid)),
    coalesce(s.n_live_tup, 0), coalesce(s.n_dead_tup, 0),
    coalesce(greatest(s.last_vacuum, s.last_autovacuum)::timestamptz(0)::text, 'never'),
    current_setting('server_version'), current_setting('synchronous_standby_names'),
    current_setting('fsync'), current_setting('full_page_writes'), current_setting('synchronous_commit'),
    current_setting('default_transaction_isolation'), current_setting('default_transaction_read_only'),
    current_setting('autovacuum')
FROM pg_class c LEFT JOIN pg_stat_all_tables s ON s.relid = c.oid
WHERE c.oid = to_regclass($1::text)
""",
)

SETTINGS: Final = (
    *("fsync", "full_page_writes", "synchronous_commit"),
    *("default_transaction_isolation", "default_transaction_read_only", "autovacuum"),
)
"""The last columns of `LOOK`."""

_TYPES: Final = {"text": ("text", "character varying"), "bigint": ("bigint",)}

_DANGERS: Final = (
    "table %s is not an ordinary one: PostgreSQL empties it after a crash; make it LOGGED",
    "fsync is off: a crash of its machine loses what was stored",
    "synchronous_commit is off: a crash loses what was stored in the last moments; set it to on for this user",
)


class MissingTableError(IdempotencyPersistenceConfigError):
    """There is no table."""


def dangers(row: Any, table: Table) -> list[str]:
    """Return what is unsafe.

    Raises:
        IdempotencyPersistenceLayerError: The table cannot be used.
    """
    exists, columns, is_unique, is_allowed, is_replica, *safe = row
    if is_replica:
        raise _errors.is_replica()
    if not exists:
        raise MissingTableError(
            f"PostgreSQL table {table.name!r} does not exist in this database; create it with "
            f"`aidem create-table` or `await layer.create_table()`, or by a migration with:\n{table.ddl()}"
        )
    found = dict(column.split(" ", 1) for column in columns.split(", "))
    missing = [f"ADD COLUMN {name} {kind}" for name, kind in COLUMNS.items() if name not in found]
    if missing:
        raise _errors.unfit(table, "lacks columns; add them with", f"ALTER TABLE {table.quoted} {', '.join(missing)};")
    wrong = [name for name, kind in COLUMNS.items() if found[name] not in _TYPES[kind.split()[0]]]
    if wrong or not is_unique:
        problem = f"has other types in {', '.join(wrong)}" if wrong else "has no unique index on id"
        raise _errors.unfit(table, f"{problem}; use another one, made with", table.ddl())
    if not is_allowed:
        raise _errors.lacks_rights(table)
    return [
        danger.replace("%s", repr(table.name)) for danger, is_safe in zip(_DANGERS, safe, strict=True) if not is_safe
    ]


def diagnosis(row: Any, table: Table, *, found: list[str]) -> Diagnosis:
    """Return what the server and the table are, and all that endangers records.

    Args:
        row: What `LOOK` has read.
        table: The table.
        found: What `dangers` has found.
    """
    milliseconds, replicas, options, size, live, dead, vacuumed, version, standby, *values = row
    settings = dict(zip(SETTINGS, values, strict=True))
    ahead_seconds = wall_clock() - milliseconds / 1000
    facts = {
        "server": f"PostgreSQL {version}",
        "table": f"{table.name}, {size}, about {live} rows and {dead} dead ones, vacuumed {vacuumed}",
        "options of the table": options,
        "replicas": f"{replicas}, " + (f"synchronous: {standby}" if standby else "none synchronous"),
        **settings,
        "clock of this machine": clock_fact(ahead_seconds),
    }
    problems = [*found, *clock_problems(ahead_seconds, danger="`aidem list` judges states by it")]
    if settings["full_page_writes"] == "off":
        problems.append("full_page_writes is off: a crash of its machine may tear pages of the table; set it to on")
    if settings["default_transaction_read_only"] == "on":
        problems.append(
            "default_transaction_read_only is on for this user, so that no call can claim its key; set it to off"
        )
    if settings["autovacuum"] == "off" or "autovacuum_enabled=false" in options.lower():
        problems.append(
            f"autovacuum is off: table {table.name!r} grows with every call, which becomes slow; set autovacuum to on, "
            f"and ALTER TABLE {table.quoted} RESET (autovacuum_enabled)"
        )
    return Diagnosis(facts, tuple(problems))
