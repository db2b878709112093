"""A scenario: a function, its options, and what happens to it, all as data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from tests.differential import functions
from tests.differential.functions import Invocation

if TYPE_CHECKING:
    from tests.differential.stage import Stage


EVERYWHERE = ("dynamodb", "redis", "own")


class Feature(StrEnum):
    """What Powertools' utility can do; every one has a scenario."""

    HANDLER = "decorator for handlers"
    FUNCTION = "decorator for any function"
    KEY_BY_JMESPATH = "key from one or more fields by JMESPath"
    WHOLE_PAYLOAD = "whole payload"
    PAYLOADS = "dataclass, pydantic and event-wrapper payloads"
    SERIALIZERS = "output serializers, deduced or explicit"
    CACHE = "in-memory cache"
    EXPIRATION = "expiration window, never left to the store's TTL alone"
    TIME_OUTS = "Lambda time-outs"
    EXCEPTIONS = "exceptions give the key back"
    PERSISTENCE_ERRORS = "persistence errors wrapped"
    DYNAMODB = "DynamoDB with simple and composite keys and configurable attribute names"
    REDIS = "Redis stand-alone and cluster, TLS by default, own client, configurable attribute names"
    BATCH = "batch processing per record"
    CONCURRENT = "concurrent executions refused"
    VALIDATION = "payload validation"
    REQUIRED_KEYS = "required keys"
    CLIENTS = "custom client configuration and sessions"
    OWN_LAYER = "bring your own layer"
    HOOK = "response hook"
    DISABLED = "disabling in tests"
    FAKES = "testing with local servers and fakes"
    PREFIX = "key prefix"
    DURABLE = "durable context"


@dataclass(frozen=True)
class Call:
    """The function is called.

    Attributes:
        payload: Its payload: the event, or the argument that `data` names; `...`: the arguments say it all.
        kwargs: More arguments by name.
        args: Arguments by position.
        context: What a handler gets instead of the scenario's context.
        inside_loop: Whether the calling thread runs an event loop.
    """

    payload: Any = ...
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    args: tuple[Any, ...] = ()
    context: Any = ...
    inside_loop: bool = False


@dataclass(frozen=True)
class Change:
    """Every stored record gets other attributes; None: it loses one."""

    attributes: Mapping[str, Any]


@dataclass(frozen=True)
class Replace:
    """Every stored record is replaced by a text."""

    text: str


@dataclass(frozen=True)
class Forget:
    """Every stored record is deleted."""


@dataclass(frozen=True)
class Differs:
    """An intended difference, as it shows in a scenario.

    Attributes:
        by: The id of the difference.
        aspect: `answer`, `ran`, `warned`, or an attribute of a record, such as `records.data`.
        powertools: What is seen of Powertools.
        aidem: What is seen of aidem.
        steps: Where in the scenario; 0 is the decoration.
        stores: On which stores it shows.
    """

    by: str
    aspect: str
    powertools: str
    aidem: str
    steps: tuple[int, ...]
    stores: tuple[str, ...]


def differ(by: str, *rows: tuple[Any, ...], stores: tuple[str, ...] = EVERYWHERE) -> tuple[Differs, ...]:
    """Return differences of one kind; each row is aspect, Powertools, aidem and the steps."""
    return tuple(Differs(by, aspect, theirs, ours, tuple(steps), stores) for aspect, theirs, ours, *steps in rows)


@dataclass(frozen=True)
class Ago:
    """An instant so many seconds ago; negative: ahead."""

    seconds: float


AGO, AHEAD = Ago(600), Ago(-600)
ORDER = {"id": 1, "amount": 2}
Step = Call | Change | Replace | Forget
TWICE = (Call(ORDER), Call(ORDER))


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """What is done on both sides, and how they may differ.

    Attributes:
        title: A sentence.
        feature: Which feature it is about.
        function: The function to decorate.
        handler: Whether by `idempotent`, as a handler.
        data: The `data_keyword_argument`.
        body: What the function does.
        build: How the decorated function is made, where one decorator is not all.
        config: Settings; `...` stands for no config at all.
        options: More options of the decorator.
        layer: Which kind of layer the store makes.
        context: The Lambda context; None: there is none.
        environment: Environment variables.
        steps: What happens.
        differs: How the sides differ, and why they may.
        stores: On which stores.
    """

    title: str
    feature: Feature
    function: Callable[..., Any] = functions.pay
    handler: bool = False
    data: str = "order"
    body: Callable[[Stage], Any] = functions.paid
    build: Callable[[Stage], Any] | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    layer: str = "plain"
    context: Any = field(default_factory=Invocation)
    environment: Mapping[str, str] = field(default_factory=dict)
    steps: tuple[Step, ...] = TWICE
    differs: tuple[Differs, ...] = ()
    stores: tuple[str, ...] = EVERYWHERE
