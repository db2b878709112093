"""The scripts: each is one atomic step on one record, judged by the server's clock.

They mirror `aidem._rules.lifecycle`, and the conformance suite proves that they agree. A script reads a record with
`cjson`, but never writes with it, which would turn `[]` into `{}` and round long numbers: what is stored is text of the
client, around instants that the script puts in. A record of ours begins with them:

    {"expiration": 1, "in_progress_expiration": 1000, "status": "INPROGRESS", "owner": "...", "fence": 1000}

The fence of a claim that is released within the millisecond of its fence would be given out again. Such a release
leaves the fence behind, for as long as that may happen, in a text that counts as no record.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

from aidem.persistence._stored import check_names

RELEASED: Final = "aidem:released:"
LONGEST_RELEASED_SECONDS: Final = 10
LOCK_SECONDS: Final = 10
CHANNEL: Final = "aidem:changed:"
GIVEN_UP: Final = "given up"
"""Stands for the duration of the lease of a claim that is given up."""


class Verdict(IntEnum):
    """What a script says about a claim or an outcome."""

    REFUSED = 0
    STORED = 1
    TAKEN_OVER = 2
    FOUND_OURS = 3
    LOCKED = 4
    ORPHAN = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class AttributeNames:
    """What the parts of a record are called in its JSON text."""

    expiry: str = "expiration"
    in_progress_expiry: str = "in_progress_expiration"
    status: str = "status"
    data: str = "data"
    validation_key: str = "validation"
    owner: str = "owner"
    fence: str = "fence"
    lease_expiry: str = "lease_expiration"
    outcome: str = "outcome"
    note: str = "note"

    def __post_init__(self) -> None:
        check_names([getattr(self, name) for name in self.__slots__])


class Script:
    """A script as the server gets it.

    Attributes:
        source: Its text.
        sha: The digest under which the server remembers it.
    """

    __slots__ = ("sha", "source")

    def __init__(self, source: str) -> None:
        self.source = source
        self.sha = hashlib.sha1(source.encode(), usedforsecurity=False).hexdigest()


class Scripts:
    """The scripts for records with certain attribute names."""

    __slots__ = ("acquire", "complete", "release", "renew", "take_over")

    def __init__(self, names: AttributeNames) -> None:
        self.acquire = _script(_ACQUIRE, names)
        self.take_over = _script(_TAKE_OVER, names)
        self.complete = _script(_COMPLETE, names)
        self.renew = _script(_RENEW, names)
        self.release = _script(_RELEASE, names)


def _script(body: str, names: AttributeNames) -> Script:
    """Put names and constants in; a name may hold any character, so it is quoted byte by byte."""
    source = _PRELUDE + body
    for field in AttributeNames.__slots__:
        name = getattr(names, field)
        source = source.replace(f"<{field}>", _quoted(name)).replace(f"<{field}:>", _quoted(f"{json.dumps(name)}: "))
    for verdict in Verdict:
        source = source.replace(f"<{verdict.name}>", str(verdict.value))
    source = source.replace("<running>", _quoted(f'{json.dumps(names.status)}: "INPROGRESS"'))
    source = source.replace("<given up>", _quoted(GIVEN_UP))
    source = source.replace("<released>", _quoted(RELEASED)).replace("<channel>", _quoted(CHANNEL))
    source = source.replace("<lock seconds>", str(LOCK_SECONDS))
    return Script(source.replace("<longest released>", str(LONGEST_RELEASED_SECONDS * 1000)))


def _quoted(text: str) -> str:
    return '"' + "".join(f"\\{byte:03d}" for byte in text.encode()) + '"'


# KEYS[1] is the record. ARGV[1] is epoch milliseconds of a clock to judge by instead of the server's, or empty;
# ARGV[2] is our owner token. Durations are milliseconds; an empty one means that there is no such instant.
# Redis turns numbers of 15 digits and more into exponent form, so `digits` writes them.
# An error after a write would not undo the write, so what comes after one is `pcall`ed.
_PRELUDE: Final = """
local key, owner = KEYS[1], ARGV[2]
local now = tonumber(ARGV[1])
if not now then
  local time = redis.call('TIME')
  now = time[1] * 1000 + math.floor(time[2] / 1000)
end
local text = redis.call('GET', key)
local found
if text then
  local decoded, value = pcall(cjson.decode, text)
  if decoded and type(value) == 'table' and type(value[<status>]) == 'string' then
    found = value
  end
end
local function number(name)
  return found and tonumber(found[name])
end
local function digits(value)
  return string.format('%.0f', value)
end
local running = found and found[<status>] == 'INPROGRESS'
local held = running and owner ~= '' and found[<owner>] == owner
local expiry = number(<expiry>)
local absent = not found or (expiry and expiry < math.floor(now / 1000))
local function store(kept, in_progress, lease, rest)
  local record, lifetime = '{'
  if kept ~= '' then
    local seconds = math.ceil((now + kept) / 1000)
    lifetime = math.max(1, (seconds + 1) * 1000 - now)
    record = record .. <expiry:> .. digits(seconds) .. ', '
  end
  if in_progress ~= '' then
    record = record .. <in_progress_expiry:> .. digits(now + in_progress) .. ', '
  end
  if lease ~= '' then
    record = record .. <lease_expiry:> .. (lease == <given up> and '0' or digits(now + lease)) .. ', '
  end
  record = record .. rest
  if lifetime then
    redis.call('SET', key, record, 'PX', digits(lifetime))
  else
    redis.call('SET', key, record)
  end
  return record
end
local function tell()
  redis.pcall('PUBLISH', <channel> .. key, '')
end
"""

# ARGV: kept, in progress, lease, and the rest of the record up to its fence. KEYS[2], if any, is the lock that
# Powertools takes before it overwrites a record: it only asks whether it is there.
_ACQUIRE: Final = """
local fence, verdict = now, <STORED>
if text then
  local ends = number(<in_progress_expiry>)
  local lapsed = running and ends and ends < now
  if not absent and held then
    return {<FOUND_OURS>, now, text}
  end
  if not absent and not lapsed then
    return {<REFUSED>, now, text}
  end
  if KEYS[2] then
    if redis.call('GET', KEYS[2]) == 'True' then
      return {<LOCKED>, now, redis.call('PTTL', KEYS[2])}
    end
    redis.call('SET', KEYS[2], 'aidem', 'EX', <lock seconds>)
  end
  local released = string.match(text, '^' .. <released> .. '(%d+)$')
  if not found and not released then
    verdict = <ORPHAN>
  elseif not absent then
    verdict = <TAKEN_OVER>
  end
  fence = (number(<fence>) or tonumber(released) or now) + 1
end
return {verdict, now, store(ARGV[3], ARGV[4], ARGV[5], ARGV[6] .. digits(fence) .. '}')}
"""

# ARGV: as above, then owner and fence of the claim found, and 1 to take it over though its lease has not passed.
_TAKE_OVER: Final = """
if absent or not running then
  return false
end
if held then
  return text
end
local theirs = type(found[<owner>]) == 'string' and found[<owner>] or ''
local fence = number(<fence>) or 0
if theirs ~= ARGV[7] or fence ~= tonumber(ARGV[8]) then
  return false
end
local ends = number(<in_progress_expiry>) or number(<lease_expiry>)
if ARGV[9] ~= '1' and not (ends and ends < now) then
  return false
end
if KEYS[2] then
  if redis.call('GET', KEYS[2]) == 'True' then
    return false
  end
  redis.call('SET', KEYS[2], 'aidem', 'EX', <lock seconds>)
end
if fence == 0 then
  fence = now
end
return store(ARGV[3], ARGV[4], ARGV[5], ARGV[6] .. digits(fence + 1) .. '}')
"""

# ARGV: kept, and the rest of the record. Whether an outcome found is the same is for the client to see.
_COMPLETE: Final = """
if not absent and not held then
  return {<REFUSED>, now, text}
end
store(ARGV[3], '', '', ARGV[4])
tell()
return {<STORED>, now, ''}
"""

# ARGV: kept, in progress, lease. All that follows the instants stays as it is. A renewal never moves a claim back, and
# none but to give it up once more follows once it was given up.
_RENEW: Final = """
if not held then
  return false
end
if ARGV[5] ~= <given up> then
  local ends = number(<in_progress_expiry>) or number(<lease_expiry>)
  if ends == 0 then
    return false
  end
  local lasts = tonumber(ARGV[4]) or tonumber(ARGV[5])
  local until_now = ends or expiry and (expiry + 1) * 1000 or math.huge
  local kept_until = ARGV[3] ~= '' and math.ceil((now + ARGV[3]) / 1000 + 1) * 1000
  local until_then = lasts and now + lasts or kept_until or math.huge
  if until_then < until_now then
    return text
  end
end
local rest = string.find(text, <running>, 1, true)
return store(ARGV[3], ARGV[4], ARGV[5], string.sub(text, rest))
"""

_RELEASE: Final = """
if not held then
  return 0
end
local fence = number(<fence>) or 0
if fence < now then
  redis.call('DEL', key)
else
  local lifetime = <longest released>
  if not tonumber(ARGV[1]) then -- a clock of a test may stand still while the server's goes on
    lifetime = math.min(fence - now + 1, lifetime)
  end
  redis.call('SET', key, <released> .. digits(fence), 'PX', digits(lifetime))
end
tell()
return 1
"""
