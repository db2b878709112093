"""Scenarios of claims: who runs, who is refused, who takes over, and what is left when a body fails."""

from __future__ import annotations

from types import SimpleNamespace

from tests.differential import builds, functions
from tests.differential.functions import Invocation, Killed
from tests.differential.scenario import AGO, AHEAD, ORDER, Call, Change, Feature, Scenario, differ

INPROGRESS = {"status": "INPROGRESS", "data": None, "in_progress_expiration": AHEAD, "owner": None}
LAPSED = INPROGRESS | {"in_progress_expiration": AGO}

CONCURRENT = (
    Scenario(
        title="a call while the same one runs",
        feature=Feature.CONCURRENT,
        body=functions.calling_itself,
    ),
    Scenario(
        title="a call while the same one runs, in a handler",
        feature=Feature.CONCURRENT,
        function=functions.handle,
        handler=True,
        body=functions.calling_itself,
    ),
    Scenario(
        title="a call while the same one runs, with the local cache",
        feature=Feature.CONCURRENT,
        body=functions.calling_itself,
        config={"use_local_cache": True},
    ),
    Scenario(
        title="a call that another process runs",
        feature=Feature.CONCURRENT,
        steps=(Call(ORDER), Change(INPROGRESS), Call(ORDER)),
    ),
    Scenario(
        title="a call that another process runs without a lease",
        feature=Feature.CONCURRENT,
        steps=(Call(ORDER), Change(INPROGRESS | {"in_progress_expiration": None}), Call(ORDER)),
    ),
    Scenario(
        title="a record of another is completed by a late owner",
        differs=differ(
            "late-owners",
            ("answer", 'returned "the late one\'s"', 'returned "the winner\'s"', 1, 2),
            ("records.data", "'\"the late one\\'s\"'", "'\"the winner\\'s\"'", 1, 2),
        ),
        feature=Feature.CONCURRENT,
        body=functions.losing_its_record,
    ),
    Scenario(
        title="a record of another, and a late owner that fails",
        differs=differ(
            "late-owners",
            ("records.status", "absent", "'COMPLETED'", 1, 2),
            ("answer", "raised LookupError", 'returned "the winner\'s"', 2),
            ("ran", "[{'order': {'amount': 2, 'id': 1}}]", "nothing", 2),
        ),
        feature=Feature.CONCURRENT,
        body=functions.losing_its_record_and_failing,
    ),
)

TIME_OUTS = (
    Scenario(
        title="a call that ran into its time-out",
        feature=Feature.TIME_OUTS,
        steps=(Call(ORDER), Change(LAPSED), Call(ORDER)),
    ),
    Scenario(
        title="a handler that ran into its time-out",
        feature=Feature.TIME_OUTS,
        function=functions.handle,
        handler=True,
        steps=(Call(ORDER), Change(LAPSED), Call(ORDER), Call(ORDER)),
    ),
    Scenario(
        title="a function without Lambda context",
        differs=differ(
            "lease-without-context",
            ("claims.in_progress_expiration", "absent", "in 0 min", 1),
            ("warned", "no remaining time", "nothing", 1, 2),
        ),
        feature=Feature.TIME_OUTS,
        context=None,
    ),
    Scenario(
        title="a handler without Lambda context",
        differs=differ(
            "lease-without-context",
            ("claims.in_progress_expiration", "absent", "in 0 min", 1),
            ("warned", "no remaining time", "nothing", 1, 2),
        ),
        feature=Feature.TIME_OUTS,
        function=functions.handle,
        handler=True,
        context=None,
    ),
    Scenario(
        title="a handler with a context that knows no remaining time",
        differs=differ(
            "context-without-time",
            ("answer", "raised IdempotencyPersistenceLayerError", "returned {'paid': True, 'run': 1}", 1, 2),
            ("ran", "nothing", "[{'amount': 2, 'id': 1}]", 1),
            ("records.status", "absent", "'COMPLETED'", 1, 2),
        ),
        feature=Feature.TIME_OUTS,
        function=functions.handle,
        handler=True,
        context=SimpleNamespace(aws_request_id="1"),
    ),
    Scenario(
        title="an invocation past its deadline",
        differs=differ("past-deadline", ("claims.in_progress_expiration", "in -10 min", "in 0 min", 1)),
        feature=Feature.TIME_OUTS,
        context=Invocation(-600),
    ),
    Scenario(
        title="a lease that is longer than the window",
        differs=differ("lease-past-window", ("claims.expiration", "in 2 min", "in 10 min", 1))
        + differ("lease-past-window", ("claims.time to live", "2 min", "10 min", 1), stores=("redis",)),
        feature=Feature.TIME_OUTS,
        config={"expires_after_seconds": 120},
    ),
    Scenario(
        title="register_lambda_context on the config",
        feature=Feature.TIME_OUTS,
        build=builds.with_registered_context,
        context=None,
    ),
)

CONTEXTS = (
    Scenario(
        title="an idempotent function in an idempotent handler, with one config",
        feature=Feature.TIME_OUTS,
        function=functions.handle,
        build=builds.function_in_handler,
        context=None,
        steps=(Call(args=(ORDER,)), Call(args=(ORDER,))),
    ),
    Scenario(
        title="a function after a handler, with one config",
        feature=Feature.TIME_OUTS,
        function=functions.handle,
        build=builds.function_after_handler,
        differs=differ("context-per-call", ("claims.in_progress_expiration", "in 10 min", "in 0 min", 1)),
        context=None,
        steps=(Call(args=(ORDER,)),),
    ),
)

EXPIRATION = (
    Scenario(
        title="a completed record that has expired and is still there",
        feature=Feature.EXPIRATION,
        steps=(Call(ORDER), Change({"expiration": AGO}), Call(ORDER), Call(ORDER)),
    ),
    Scenario(
        title="a claim that has expired and is still there",
        feature=Feature.EXPIRATION,
        steps=(Call(ORDER), Change(INPROGRESS | {"expiration": AGO, "in_progress_expiration": None}), Call(ORDER)),
    ),
    Scenario(
        title="a window of a day",
        feature=Feature.EXPIRATION,
        config={"expires_after_seconds": 86_400},
    ),
    Scenario(
        title="a window of no time",
        differs=differ(
            "checked-at-once",
            ("answer", "returned 'a function'", "raised IdempotencyConfigError", 0),
            ("answer", "returned {'paid': True, 'run': 1}", "not reached", 1),
        ),
        feature=Feature.EXPIRATION,
        config={"expires_after_seconds": 0},
        steps=(Call(ORDER),),
        stores=("dynamodb", "own"),
    ),
)

FAILURES = (
    Scenario(
        title="a body that raises gives the key back",
        feature=Feature.EXCEPTIONS,
        body=functions.failing_at_first(LookupError()),
        steps=(Call(ORDER), Call(ORDER), Call(ORDER)),
    ),
    Scenario(
        title="a handler that raises gives the key back",
        feature=Feature.EXCEPTIONS,
        function=functions.handle,
        handler=True,
        body=functions.failing_at_first(LookupError()),
        steps=(Call(ORDER), Call(ORDER), Call(ORDER)),
    ),
    Scenario(
        title="a body that raises, with the local cache",
        feature=Feature.EXCEPTIONS,
        config={"use_local_cache": True},
        body=functions.failing_at_first(LookupError()),
        steps=(Call(ORDER), Call(ORDER), Call(ORDER)),
    ),
    Scenario(
        title="a body that is ended by no Exception",
        differs=differ(
            "base-exceptions",
            ("records.status", "'INPROGRESS'", "absent", 1),
            ("answer", "raised IdempotencyAlreadyInProgressError", "returned {'paid': True, 'run': 2}", 2),
            ("ran", "nothing", "[{'order': {'amount': 2, 'id': 1}}]", 2),
            ("records.status", "'INPROGRESS'", "'COMPLETED'", 2),
        ),
        feature=Feature.EXCEPTIONS,
        body=functions.failing_at_first(Killed()),
    ),
    Scenario(
        title="a body that is ended by Ctrl-C",
        differs=differ(
            "base-exceptions",
            ("records.status", "'INPROGRESS'", "absent", 1),
            ("answer", "raised IdempotencyAlreadyInProgressError", "returned {'paid': True, 'run': 2}", 2),
            ("ran", "nothing", "[{'order': {'amount': 2, 'id': 1}}]", 2),
            ("records.status", "'INPROGRESS'", "'COMPLETED'", 2),
        ),
        feature=Feature.EXCEPTIONS,
        body=functions.failing_at_first(KeyboardInterrupt()),
    ),
)

STORE_FAILURES = (
    Scenario(
        title="a database that cannot be reached",
        feature=Feature.PERSISTENCE_ERRORS,
        layer="boto_config",
        environment={"AWS_ENDPOINT_URL_DYNAMODB": "http://127.0.0.1:9"},
        steps=(Call(ORDER),),
        stores=("dynamodb",),
    ),
    Scenario(
        title="a table that is not there",
        feature=Feature.PERSISTENCE_ERRORS,
        layer="missing",
        steps=(Call(ORDER),),
        stores=("dynamodb",),
    ),
    Scenario(
        title="a table that vanishes while the body runs",
        feature=Feature.PERSISTENCE_ERRORS,
        body=functions.losing_its_store,
        steps=(Call(ORDER),),
        stores=("dynamodb",),
    ),
    Scenario(
        title="a table that vanishes, and the body fails",
        differs=differ(
            "own-exceptions", ("answer", "raised IdempotencyPersistenceLayerError", "raised LookupError", 1)
        ),
        feature=Feature.PERSISTENCE_ERRORS,
        body=functions.losing_its_store_and_failing,
        steps=(Call(ORDER),),
        stores=("dynamodb",),
    ),
)


def durable(operations: int) -> SimpleNamespace:
    return SimpleNamespace(state=SimpleNamespace(operations=[0] * operations), lambda_context=Invocation())


DURABLE = (
    Scenario(
        title="a durable context that replays nothing",
        feature=Feature.DURABLE,
        function=functions.handle,
        handler=True,
        context=durable(1),
    ),
    Scenario(
        title="a durable replay of a call that did not finish",
        feature=Feature.DURABLE,
        function=functions.handle,
        handler=True,
        steps=(
            Call(ORDER, context=durable(1)),
            Change({"status": "INPROGRESS", "data": None, "in_progress_expiration": AHEAD}),
            Call(ORDER, context=durable(2)),
            Call(ORDER, context=durable(3)),
        ),
    ),
    Scenario(
        title="another invocation while a durable one is suspended",
        feature=Feature.DURABLE,
        function=functions.handle,
        handler=True,
        steps=(Call(ORDER, context=durable(1)), Change(INPROGRESS), Call(ORDER, context=durable(1))),
    ),
    Scenario(
        title="a durable replay of a claim without an owner",
        differs=differ(
            "durable-without-owner",
            ("answer", "returned {'paid': True, 'run': 2}", "raised IdempotencyAlreadyInProgressError", 3),
            ("ran", "[{'amount': 2, 'id': 1}]", "nothing", 3),
            ("records.status", "'COMPLETED'", "'INPROGRESS'", 3),
        ),
        feature=Feature.DURABLE,
        function=functions.handle,
        handler=True,
        steps=(Call(ORDER, context=durable(1)), Change(INPROGRESS), Call(ORDER, context=durable(2))),
    ),
)

SCENARIOS = CONCURRENT + TIME_OUTS + CONTEXTS + EXPIRATION + FAILURES + STORE_FAILURES + DURABLE
