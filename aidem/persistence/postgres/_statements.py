"""The statements: each operation is one, which decides and writes in one atomic step, by the server's clock.

They mirror `aidem._rules.lifecycle`, and the conformance suite proves that they agree. Each answers one row: the time
by the clock that judged, in epoch milliseconds, what has become of the operation, and a record.

No operation waits while a transaction holds the record, except to complete or to drop it: rows are locked with
`SKIP LOCKED`. A row that is to be had but cannot be locked is held by a transaction, or changes at this moment;
the layer then asks again. `clock_timestamp()` is the time now; `now()` would be the time at which a transaction began.

A released record stays, with the status `RELEASED` and its fence, until its window ends, so that fences keep growing.
It counts as absent.
"""

from __future__ import annotations

from enum import IntEnum
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from aidem.persistence.postgres._table import Table

RELEASED: Final = "RELEASED"

PURGE_DELAY_SECONDS: Final = 60
"""How much later than its first expiry a record is looked at to be purged: by then most records that were completed
have expired, and so are removed at the first look. The time to look is indexed, and therefore stays as it is."""


class Verdict(IntEnum):
    """What has become of an operation."""

    REFUSED = 0
    """Nothing was written; the record is the one found, if any."""
    DONE = 1
    TAKEN_OVER = 2
    UNCHANGED = 3
    """The claim is ours, and the renewal would have moved it back."""


class Statement(NamedTuple):
    """A statement, with the name under which it is prepared."""

    name: str
    text: str


RECORD: Final = (
    "expiration, in_progress_expiration, lease_expiration, status, data, validation, owner, fence, outcome, note"
)

_OF_R: Final = ", ".join(f"r.{name}" for name in RECORD.split(", "))

# $1 is the key, $2 epoch milliseconds of a clock to judge by instead of the server's, and $3 our owner token. Durations
# are milliseconds; NULL means that there is no such instant.
_CLOCK: Final = """t AS MATERIALIZED (
    SELECT coalesce($2::bigint, floor(extract(epoch FROM clock_timestamp()) * 1000)::bigint) AS now
)"""

_ABSENT: Final = f"(r.status = '{RELEASED}' OR r.expiration < t.now / 1000)"
_HELD: Final = "(r.owner = $3::text AND r.status = 'INPROGRESS')"
_LAPSED: Final = "(r.status = 'INPROGRESS' AND r.in_progress_expiration < t.now)"

_EXPIRATION: Final = "(t.now + $4::bigint + 999) / 1000"
_PURGE_AFTER: Final = f"{_EXPIRATION} + {PURGE_DELAY_SECONDS}"

# What is stored for a claim: ... $5 in progress, $6 lease, $7 the validation hash, $8 the note.
_SET_CLAIM: Final = f"""
    SET expiration = {_EXPIRATION}, in_progress_expiration = t.now + $5::bigint, lease_expiration = t.now + $6::bigint,
        status = 'INPROGRESS', data = NULL, validation = $7::text, owner = $3::text, outcome = NULL, note = $8::text,
        fence = coalesce(nullif(free.fence, 0), t.now) + 1, purge_after = {_PURGE_AFTER}
"""

# The final SELECT answers a row in any case.
_ACQUIRE: Final = f"""
WITH {_CLOCK},
free AS MATERIALIZED (
    SELECT r.id, r.fence, {_ABSENT} AS absent
    FROM <table> r CROSS JOIN t
    WHERE r.id = $1::text AND ({_ABSENT} OR ({_LAPSED} AND {_HELD} IS NOT TRUE))
    FOR UPDATE OF r SKIP LOCKED
),
taken AS (
    UPDATE <table> r
    {_SET_CLAIM}
    FROM free CROSS JOIN t
    WHERE r.id = free.id
    RETURNING free.absent, {_OF_R}
),
fresh AS (
    INSERT INTO <table> AS r (
        id, expiration, in_progress_expiration, lease_expiration, status, validation, owner, fence, note, purge_after
    )
    SELECT $1::text, {_EXPIRATION}, t.now + $5::bigint, t.now + $6::bigint, 'INPROGRESS', $7::text, $3::text, t.now,
        $8::text, {_PURGE_AFTER}
    FROM t
    WHERE NOT EXISTS (SELECT FROM <table> r WHERE r.id = $1::text)
    ON CONFLICT (id) DO NOTHING
    RETURNING {_OF_R}
)
SELECT t.now, CASE WHEN absent THEN {Verdict.DONE} ELSE {Verdict.TAKEN_OVER} END, {RECORD} FROM taken CROSS JOIN t
UNION ALL
SELECT t.now, {Verdict.DONE}, {RECORD} FROM fresh CROSS JOIN t
UNION ALL
SELECT t.now, {Verdict.REFUSED}, {_OF_R}
FROM t LEFT JOIN <table> r ON r.id = $1::text
WHERE NOT EXISTS (SELECT FROM taken) AND NOT EXISTS (SELECT FROM fresh)
"""

# ... and $9 and $10 the owner and the fence of the claim found, $11 whether its lease does not count.
_TAKE_OVER: Final = f"""
WITH {_CLOCK},
free AS MATERIALIZED (
    SELECT r.id, r.fence
    FROM <table> r CROSS JOIN t
    WHERE r.id = $1::text AND r.status = 'INPROGRESS' AND {_ABSENT} IS NOT TRUE AND {_HELD} IS NOT TRUE
        AND r.owner IS NOT DISTINCT FROM $9::text AND r.fence = $10::bigint
        AND ($11::boolean OR coalesce(r.in_progress_expiration, r.lease_expiration) < t.now)
    FOR UPDATE OF r SKIP LOCKED
),
taken AS (
    UPDATE <table> r
    {_SET_CLAIM}
    FROM free CROSS JOIN t
    WHERE r.id = free.id
    RETURNING {_OF_R}
)
SELECT t.now, {Verdict.TAKEN_OVER}, {RECORD} FROM taken CROSS JOIN t
UNION ALL
SELECT t.now, {Verdict.REFUSED}, {_OF_R}
FROM t LEFT JOIN <table> r ON r.id = $1::text
WHERE NOT EXISTS (SELECT FROM taken)
"""

# ... $5 data, $6 the kind of outcome, $7 the validation hash, $8 the fence, $9 the note. Whether an outcome found is
# the same is for the client to see.
_COMPLETE: Final = f"""
WITH {_CLOCK},
stored AS (
    UPDATE <table> r
    SET expiration = {_EXPIRATION}, in_progress_expiration = NULL, lease_expiration = NULL, status = 'COMPLETED',
        data = $5::text, validation = $7::text, owner = $3::text, fence = greatest(r.fence, $8::bigint),
        outcome = $6::text, note = $9::text
    FROM t
    WHERE r.id = $1::text AND ({_HELD} OR {_ABSENT})
    RETURNING 1
),
fresh AS (
    INSERT INTO <table> (id, expiration, status, data, validation, owner, fence, outcome, note, purge_after)
    SELECT $1::text, {_EXPIRATION}, 'COMPLETED', $5::text, $7::text, $3::text, $8::bigint, $6::text, $9::text,
        {_PURGE_AFTER}
    FROM t
    WHERE NOT EXISTS (SELECT FROM <table> r WHERE r.id = $1::text)
    ON CONFLICT (id) DO NOTHING
    RETURNING 1
)
SELECT t.now, CASE WHEN EXISTS (SELECT FROM stored) OR EXISTS (SELECT FROM fresh) THEN {Verdict.DONE}
    ELSE {Verdict.REFUSED} END, {_OF_R}
FROM t LEFT JOIN <table> r ON r.id = $1::text
"""

# ... $5 in progress, $6 lease, $7 whether the claim is given up. A renewal never moves a claim back, and none but to
# give it up once more follows once it was given up. Until when a claim holds: the end of its lease, or without one the
# expiry of its record; NULL: for ever.
_RENEW: Final = f"""
WITH {_CLOCK},
ours AS MATERIALIZED (
    SELECT r.id, {_OF_R}
    FROM <table> r
    WHERE r.id = $1::text AND {_HELD}
    FOR UPDATE OF r SKIP LOCKED
),
moved AS (
    UPDATE <table> r
    SET expiration = {_EXPIRATION}, in_progress_expiration = t.now + $5::bigint,
        lease_expiration = CASE WHEN $7::boolean THEN 0 ELSE t.now + $6::bigint END
    FROM ours CROSS JOIN t CROSS JOIN LATERAL (
        SELECT coalesce(ours.in_progress_expiration, ours.lease_expiration, (ours.expiration + 1) * 1000) AS until_now,
            coalesce(t.now + $5::bigint, t.now + $6::bigint, ({_EXPIRATION} + 1) * 1000) AS until_then
    ) holds
    WHERE r.id = ours.id AND ($7::boolean OR (
        until_now IS DISTINCT FROM 0 AND (until_then IS NULL OR until_then >= until_now) IS TRUE
    ))
    RETURNING {_OF_R}
)
SELECT t.now, {Verdict.DONE}, {RECORD} FROM moved CROSS JOIN t
UNION ALL
SELECT t.now, {Verdict.UNCHANGED}, {RECORD} FROM ours CROSS JOIN t WHERE NOT EXISTS (SELECT FROM moved)
UNION ALL
SELECT t.now, {Verdict.REFUSED}, {_OF_R}
FROM t LEFT JOIN <table> r ON r.id = $1::text
WHERE NOT EXISTS (SELECT FROM ours)
"""

_RELEASE: Final = f"""
WITH {_CLOCK},
ours AS MATERIALIZED (
    SELECT r.id
    FROM <table> r
    WHERE r.id = $1::text AND {_HELD}
    FOR UPDATE OF r SKIP LOCKED
),
released AS (
    UPDATE <table> r
    SET expiration = coalesce(r.expiration, t.now / 1000), in_progress_expiration = NULL, lease_expiration = NULL,
        status = '{RELEASED}', validation = NULL, owner = NULL, note = NULL,
        purge_after = coalesce(r.purge_after, t.now / 1000)
    FROM ours CROSS JOIN t
    WHERE r.id = ours.id
    RETURNING 1
)
SELECT t.now, CASE WHEN EXISTS (SELECT FROM released) THEN {Verdict.DONE} ELSE {Verdict.REFUSED} END, {_OF_R}
FROM t LEFT JOIN <table> r ON r.id = $1::text
"""

_IS_FREE: Final = f"""
WITH {_CLOCK},
ours AS MATERIALIZED (
    SELECT r.id
    FROM <table> r
    WHERE r.id = $1::text AND {_HELD}
    FOR UPDATE OF r SKIP LOCKED
)
SELECT t.now, CASE WHEN EXISTS (SELECT FROM ours) THEN {Verdict.DONE} ELSE {Verdict.REFUSED} END, {_OF_R}
FROM t LEFT JOIN <table> r ON r.id = $1::text
"""

# In a transaction of the caller's, by any driver: the placeholders are the clock, key, owner, duration, data, and kind
# of outcome. A claim that another transaction holds is not seen.
_COMPLETE_IN: Final = """
WITH t AS MATERIALIZED (
    SELECT coalesce(?::bigint, floor(extract(epoch FROM clock_timestamp()) * 1000)::bigint) AS now
),
ours AS MATERIALIZED (
    SELECT r.id
    FROM <table> r
    WHERE r.id = ?::text AND r.owner = ?::text AND r.status = 'INPROGRESS'
    FOR UPDATE OF r SKIP LOCKED
)
UPDATE <table> r
SET expiration = (t.now + ?::bigint + 999) / 1000, in_progress_expiration = NULL, lease_expiration = NULL,
    status = 'COMPLETED', data = ?::text, outcome = ?::text
FROM ours CROSS JOIN t
WHERE r.id = ours.id
"""

# In the same transaction: sees the claim if only its lock is another's, and then gives that one time to end.
_PAUSE_IF_SEEN: Final = """
SELECT pg_sleep(0.01) FROM <table> r WHERE r.id = ?::text AND r.owner = ?::text AND r.status = 'INPROGRESS'
"""

_GET: Final = f"""
SELECT 0::bigint, {Verdict.REFUSED}, {RECORD} FROM <table> WHERE id = $1::text
"""

_FORGET: Final = """
DELETE FROM <table> WHERE id = $1::text
"""

# $1 is what keys begin with, $2 the last key of the page before, $3 how many records a page has. By bytes, whatever the
# collation of the column: so all keys that begin with the same text lie together.
_SCAN: Final = f"""
SELECT 0::bigint, {Verdict.REFUSED}, {RECORD}, id
FROM <table>
WHERE id COLLATE "C" >= $1::text AND id COLLATE "C" > $2::text
ORDER BY id COLLATE "C"
LIMIT $3::bigint
"""

# $1 is the last key of the page before, $2 the clock, $3 how many records a page has. The answer is the last key of
# this page, and how many records it has removed; what is left of released ones is none.
_PURGE_PAGE: Final = f"""
WITH {_CLOCK},
page AS MATERIALIZED (
    SELECT r.id
    FROM <table> r
    WHERE r.id COLLATE "C" > $1::text
    ORDER BY r.id COLLATE "C"
    LIMIT $3::bigint
),
expired AS MATERIALIZED (
    SELECT r.id
    FROM page JOIN <table> r ON r.id = page.id CROSS JOIN t
    WHERE r.expiration < t.now / 1000
    FOR UPDATE OF r SKIP LOCKED
),
gone AS (
    DELETE FROM <table> r USING expired WHERE r.id = expired.id RETURNING r.status
)
SELECT (SELECT max(id COLLATE "C") FROM page), (SELECT count(*) FROM gone WHERE status <> '{RELEASED}')
"""

# $1 is how many at most, $2 the clock.
_PURGE: Final = f"""
WITH {_CLOCK},
expired AS MATERIALIZED (
    SELECT r.id
    FROM <table> r CROSS JOIN t
    WHERE r.purge_after < t.now / 1000 AND r.expiration < t.now / 1000
    ORDER BY r.purge_after
    LIMIT $1::bigint
    FOR UPDATE OF r SKIP LOCKED
)
DELETE FROM <table> r USING expired WHERE r.id = expired.id
"""


class Statements:
    """The statements for one table."""

    __slots__ = (
        "acquire",
        "complete",
        "complete_in",
        "forget",
        "get",
        "is_free",
        "pause_if_seen",
        "purge",
        "purge_page",
        "release",
        "renew",
        "scan",
        "take_over",
    )

    def __init__(self, table: Table) -> None:
        def statement(name: str, text: str) -> Statement:
            return Statement(f"aidem_{name}", text.replace("<table>", table.quoted))

        self.acquire = statement("acquire", _ACQUIRE)
        self.complete = statement("complete", _COMPLETE)
        self.renew = statement("renew", _RENEW)
        self.release = statement("release", _RELEASE)
        self.get = statement("get", _GET)
        self.is_free = statement("is_free", _IS_FREE)
        self.complete_in = _COMPLETE_IN.replace("<table>", table.quoted)
        self.pause_if_seen = _PAUSE_IF_SEEN.replace("<table>", table.quoted)
        self.forget = statement("forget", _FORGET)
        self.purge = statement("purge", _PURGE)
        self.take_over = statement("take_over", _TAKE_OVER)
        self.scan = statement("scan", _SCAN)
        self.purge_page = statement("purge_page", _PURGE_PAGE)
