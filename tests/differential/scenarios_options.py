"""Scenarios of decorators and options: names, layers, clients, the cache, the switch, batches."""

from __future__ import annotations

from tests.differential import builds, functions
from tests.differential.scenario import AGO, ORDER, Call, Change, Feature, Forget, Replace, Scenario, differ

HANDLERS = (
    Scenario(title="a handler", feature=Feature.HANDLER, function=functions.handle, handler=True),
    Scenario(
        title="a handler without a config",
        differs=differ(
            "default-hash",
            (
                "claims.key",
                "pay#90b4ba116b16549a25be7c8a1a07053c",
                "pay#d0f589d73c680f36f1a6428718b00241c078d1dc39390a2d253928154909a2cc",
                1,
            ),
            (
                "records.key",
                "pay#90b4ba116b16549a25be7c8a1a07053c",
                "pay#d0f589d73c680f36f1a6428718b00241c078d1dc39390a2d253928154909a2cc",
                1,
                2,
            ),
        ),
        feature=Feature.HANDLER,
        build=builds.without_config,
        function=functions.handle,
        handler=True,
    ),
    Scenario(
        title="a handler with another argument",
        feature=Feature.HANDLER,
        function=functions.handle_with_option,
        handler=True,
        steps=(Call(ORDER, kwargs={"dry_run": True}), Call(ORDER)),
    ),
    Scenario(
        title="the name of the Lambda function is in the key",
        feature=Feature.HANDLER,
        function=functions.handle,
        handler=True,
        environment={"AWS_LAMBDA_FUNCTION_NAME": "payments"},
    ),
)

FUNCTIONS = (
    Scenario(
        title="a function with other arguments",
        feature=Feature.FUNCTION,
        function=functions.pay_with_note,
        steps=(Call(ORDER, args=("first",)), Call(ORDER, kwargs={"note": "second"})),
    ),
    Scenario(
        title="the payload among arbitrary keyword arguments",
        feature=Feature.FUNCTION,
        function=functions.pay_anything,
        steps=(Call(ORDER, kwargs={"note": "first"}), Call(ORDER)),
    ),
    Scenario(title="a method", feature=Feature.FUNCTION, build=builds.as_method),
    Scenario(title="a method of a class", feature=Feature.FUNCTION, build=builds.as_classmethod),
    Scenario(title="a static method", feature=Feature.FUNCTION, build=builds.as_staticmethod),
    Scenario(
        title="the payload by position",
        differs=differ(
            "positional-payload",
            ("answer", "raised RuntimeError", "returned {'paid': True, 'run': 1}", 1),
            ("ran", "nothing", "[{'amount': 2, 'id': 1}]", 1),
            ("records.status", "absent", "'COMPLETED'", 1),
            ("ran", "[{'order': {'amount': 2, 'id': 1}}]", "nothing", 2),
        ),
        feature=Feature.FUNCTION,
        steps=(Call(args=(ORDER,)), Call(ORDER)),
    ),
    Scenario(
        title="the payload left at its default",
        differs=differ(
            "positional-payload",
            ("answer", "raised RuntimeError", "returned {'paid': True, 'run': 1}", 1, 2),
            ("ran", "nothing", "[]", 1),
            ("records.status", "absent", "'COMPLETED'", 1, 2),
        ),
        feature=Feature.FUNCTION,
        function=functions.pay_by_default,
        steps=(Call(), Call()),
    ),
    Scenario(
        title="a payload that the signature does not name",
        differs=differ(
            "checked-at-once",
            ("answer", "returned 'a function'", "raised IdempotencyConfigError", 0),
            ("answer", "raised RuntimeError", "not reached", 1),
        ),
        feature=Feature.FUNCTION,
        data="basket",
        steps=(Call(args=(ORDER,)),),
    ),
    Scenario(
        title="an option that there is not",
        differs=differ(
            "unknown-options",
            ("answer", "returned 'a function'", "raised TypeError", 0),
            ("answer", "returned {'paid': True, 'run': 1}", "not reached", 1, 2),
        ),
        feature=Feature.FUNCTION,
        options={"key_perfix": "pay"},
    ),
    Scenario(
        title="a lambda expression without a key prefix",
        differs=differ(
            "checked-at-once",
            ("answer", "returned 'a function'", "raised IdempotencyConfigError", 0),
            ("answer", "returned {'paid': True, 'run': 1}", "not reached", 1, 2),
        ),
        feature=Feature.FUNCTION,
        build=builds.lambda_expression,
    ),
    Scenario(
        title="an async function",
        differs=differ(
            "async-functions",
            ("answer", "returned 'a function'", "raised TypeError", 0),
            ("answer", "raised IdempotencyPersistenceLayerError", "not reached", 1),
            ("answer", "raised IdempotencyAlreadyInProgressError", "not reached", 2),
        ),
        feature=Feature.FUNCTION,
        build=builds.async_function,
    ),
    Scenario(
        title="a call on a thread that runs an event loop",
        differs=differ(
            "event-loop",
            ("answer", "returned {'paid': True, 'run': 1}", "raised IdempotencyUsageError", 1),
            ("ran", "[{'order': {'amount': 2, 'id': 1}}]", "nothing", 1),
            ("records.status", "'COMPLETED'", "absent", 1),
        ),
        feature=Feature.FUNCTION,
        steps=(Call(ORDER, inside_loop=True),),
    ),
    Scenario(
        title="a setting by position",
        differs=differ(
            "frozen-config",
            ("answer", "returned 'a function'", "raised TypeError", 0),
            ("answer", "returned {'paid': True, 'run': 1}", "not reached", 1, 2),
        ),
        feature=Feature.FUNCTION,
        build=builds.with_setting_by_position,
    ),
    Scenario(
        title="a setting that is changed later",
        differs=differ(
            "frozen-config",
            ("answer", "returned 'a function'", "raised FrozenInstanceError", 0),
            ("answer", "returned {'paid': True, 'run': 1}", "not reached", 1, 2),
        ),
        feature=Feature.FUNCTION,
        build=builds.with_setting_changed_later,
    ),
    Scenario(
        title="a hash that there is not",
        differs=differ(
            "checked-at-once",
            ("answer", "returned 'a function'", "raised IdempotencyConfigError", 0),
            ("answer", "raised AttributeError", "not reached", 1),
        ),
        feature=Feature.WHOLE_PAYLOAD,
        config={"hash_function": "md6"},
        steps=(Call(ORDER),),
    ),
)

PREFIXES = (
    Scenario(title="a key prefix", feature=Feature.PREFIX, options={"key_prefix": "pay"}),
    Scenario(
        title="a key prefix of a handler",
        feature=Feature.PREFIX,
        function=functions.handle,
        handler=True,
        options={"key_prefix": "pay"},
        environment={"AWS_LAMBDA_FUNCTION_NAME": "payments"},
    ),
)

LAYERS = (
    Scenario(
        title="an item in DynamoDB",
        feature=Feature.DYNAMODB,
        differs=differ("completed-lease", ("in_progress_expiration of completed records", "in 10 min", "absent", 1, 2)),
        stores=("dynamodb",),
    ),
    Scenario(title="a composite key", feature=Feature.DYNAMODB, layer="composite", stores=("dynamodb",)),
    Scenario(title="other names of attributes", feature=Feature.DYNAMODB, layer="names", stores=("dynamodb",)),
    Scenario(title="a configuration of botocore", feature=Feature.CLIENTS, layer="boto_config", stores=("dynamodb",)),
    Scenario(title="a session", feature=Feature.CLIENTS, layer="session", stores=("dynamodb",)),
    Scenario(title="a value in Redis", feature=Feature.REDIS, stores=("redis",)),
    Scenario(
        title="values in a Redis cluster",
        feature=Feature.REDIS,
        steps=tuple(Call({"id": number % 8}) for number in range(16)),
        stores=("cluster",),
    ),
    Scenario(
        title="a time-out in a Redis cluster",
        feature=Feature.REDIS,
        steps=(Call(ORDER), Change({"status": "INPROGRESS", "data": None, "in_progress_expiration": AGO}), Call(ORDER)),
        stores=("cluster",),
    ),
    Scenario(title="a Redis client of one's own", feature=Feature.REDIS, layer="client", stores=("redis",)),
    Scenario(title="other names in Redis", feature=Feature.REDIS, layer="names", stores=("redis",)),
    Scenario(
        title="an expired record with other names in Redis",
        differs=differ(
            "redis-names",
            ("answer", "returned {'paid': True, 'run': 1}", "returned {'paid': True, 'run': 2}", 3),
            ("ran", "nothing", "[{'order': {'amount': 2, 'id': 1}}]", 3),
            ("records.data", '\'{"paid": true, "run": 1}\'', '\'{"paid": true, "run": 2}\'', 3),
            ("records.expiration", "in -10 min", "in 60 min", 3),
        ),
        feature=Feature.REDIS,
        layer="names",
        steps=(Call(ORDER), Change({"expiration": AGO}), Call(ORDER)),
        stores=("redis",),
    ),
    Scenario(
        title="a value in Redis that is no record",
        feature=Feature.REDIS,
        steps=(Call(ORDER), Replace("no JSON"), Call(ORDER), Call(ORDER)),
        stores=("redis",),
    ),
    Scenario(title="a layer of one's own", feature=Feature.OWN_LAYER, stores=("own",)),
    Scenario(title="a layer for tests", feature=Feature.FAKES, stores=("own",), config={"use_local_cache": True}),
    Scenario(
        title="one layer for a function that calls another",
        differs=differ(
            "shared-layer",
            ("records.data", '\'{"inner": {"paid": true, "run": 2}}\'', '\'{"paid": true, "run": 2}\'', 1, 2),
            ("records.status", "'INPROGRESS'", "'COMPLETED'", 1, 2),
            ("answer", "raised IdempotencyAlreadyInProgressError", "returned {'inner': {'paid': True, 'run': 2}}", 2),
        ),
        feature=Feature.OWN_LAYER,
        build=builds.one_in_another,
    ),
    Scenario(
        title="one layer for two configs",
        differs=differ(
            "shared-layer",
            ("claims.key", "second#c4ca4238a0b923820dcc509a6f75849b", "second#c81e728d9d4c2f636f067f89cc14862c", 1),
            ("records.key", "second#c4ca4238a0b923820dcc509a6f75849b", "second#c81e728d9d4c2f636f067f89cc14862c", 1, 2),
            (
                "answer",
                "returned [{'paid': True, 'run': 1}, {'paid': True, 'run': 2}]",
                "returned [{'paid': True, 'run': 1}, {'paid': True, 'run': 3}]",
                2,
            ),
            ("ran", "nothing", "[{'order': {'amount': 3, 'id': 1}}]", 2),
            ("records.status", "absent", "'COMPLETED'", 2),
        ),
        feature=Feature.OWN_LAYER,
        build=builds.second_config,
        steps=(Call(ORDER), Call(ORDER | {"amount": 3})),
    ),
)

CACHED = {"use_local_cache": True}
CACHE = (
    Scenario(
        title="a result is in the cache when the store has lost it",
        feature=Feature.CACHE,
        config=CACHED,
        steps=(Call(ORDER), Forget(), Call(ORDER)),
    ),
    Scenario(
        title="without the cache a lost record runs again",
        feature=Feature.CACHE,
        steps=(Call(ORDER), Forget(), Call(ORDER)),
    ),
    Scenario(
        title="what a replay found is in the cache",
        feature=Feature.CACHE,
        config=CACHED,
        build=builds.completed_elsewhere,
        steps=(Call(ORDER), Forget(), Call(ORDER)),
    ),
    Scenario(
        title="a cache of one result",
        feature=Feature.CACHE,
        config=CACHED | {"local_cache_max_items": 1},
        steps=(Call(ORDER), Call({"id": 2}), Forget(), Call({"id": 2}), Call(ORDER)),
    ),
)

DISABLED = (
    *(
        Scenario(
            title=f"POWERTOOLS_IDEMPOTENCY_DISABLED={value}",
            feature=Feature.DISABLED,
            environment={"POWERTOOLS_IDEMPOTENCY_DISABLED": value},
        )
        for value in ("true", "1", "YES", "false", "0")
    ),
    Scenario(
        title="POWERTOOLS_IDEMPOTENCY_DISABLED is empty",
        differs=differ(
            "empty-switch",
            ("answer", "raised ValueError", "returned {'paid': True, 'run': 1}", 1, 2),
            ("ran", "nothing", "[{'order': {'amount': 2, 'id': 1}}]", 1),
            ("records.status", "absent", "'COMPLETED'", 1, 2),
        ),
        feature=Feature.DISABLED,
        environment={"POWERTOOLS_IDEMPOTENCY_DISABLED": ""},
    ),
    Scenario(
        title="a handler while idempotency is disabled",
        feature=Feature.DISABLED,
        function=functions.handle,
        handler=True,
        environment={"POWERTOOLS_IDEMPOTENCY_DISABLED": "true"},
    ),
)

BATCHES = (
    Scenario(
        title="a batch whose failed records come again",
        feature=Feature.BATCH,
        function=functions.pay_record,
        build=builds.batch,
        data="record",
        config={"event_key_jmespath": "messageId"},
        steps=(Call(args=(builds.SQS_EVENT,)), Call(args=(builds.SQS_EVENT,))),
    ),
)

SCENARIOS = HANDLERS + FUNCTIONS + PREFIXES + LAYERS + CACHE + DISABLED + BATCHES
