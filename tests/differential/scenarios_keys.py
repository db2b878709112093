"""Scenarios of keys: what is selected from which payload, what counts as none, what must not change under one."""

from __future__ import annotations

import base64
import dataclasses
import gzip
import json
from typing import Any

import jmespath.functions
from pydantic import SecretStr

from tests.differential import functions
from tests.differential.functions import PAYLOADS
from tests.differential.scenario import AGO, AHEAD, ORDER, Call, Change, Feature, Scenario, differ

BODY = json.dumps({"order_id": "o-1", "items": [1, 2]})
PACKED = base64.b64encode(gzip.compress(BODY.encode(), mtime=0)).decode()
VALIDATED = {"event_key_jmespath": "id", "payload_validation_jmespath": "amount"}


class Doubling(jmespath.functions.Functions):
    @jmespath.functions.signature({"types": ["number"]})
    def _func_doubled(self, value: float) -> float:
        return value * 2


def selects(title: str, expression: str, first: Any, second: Any, **more: Any) -> Scenario:
    return Scenario(
        title=title,
        feature=Feature.KEY_BY_JMESPATH,
        config={"event_key_jmespath": expression},
        steps=(Call(first), Call(second)),
        **more,
    )


BY_JMESPATH = (
    selects("one field is the key", "id", ORDER, ORDER | {"amount": 3}),
    selects("a field of zero is a key", "id", {"id": 0}, {"id": 0, "amount": 3}),
    selects("a field of false is a key", "id", {"id": False}, {"id": False, "amount": 3}),
    selects("several fields are the key", "[id, amount]", ORDER, {"amount": 2, "id": 1, "note": "other"}),
    selects("several named fields are the key", "{a: id, b: amount}", ORDER, {"amount": 2, "id": 1, "note": "other"}),
    selects("another value is another key", "id", ORDER, {"id": 2}),
    selects("some of several fields are there", "[id, nothing]", ORDER, ORDER | {"note": "other"}),
    selects(
        "records that lack the selected fields",
        "Records[].[bucket.name, object.key]",
        {"Records": [{"id": 1}]},
        {"Records": [{"id": 2}]},
        differs=differ(
            "nothing-deeper",
            ("answer", "returned {'paid': True, 'run': 1}", "returned {'paid': True, 'run': 2}", 2),
            ("ran", "nothing", "[{'order': {'Records': [{'id': 2}]}}]", 2),
            ("warned", "nothing", "no key", 1, 2),
            ("claims.status", "'INPROGRESS'", "absent", 1),
            ("records.status", "'COMPLETED'", "absent", 1, 2),
        ),
    ),
    selects("JSON in a body", "powertools_json(body).order_id", {"body": BODY}, {"body": BODY, "at": 1}),
    selects("base64 in a body", "powertools_base64(body)", {"body": "YQ=="}, {"body": "YQ==", "at": 1}),
    selects(
        "JSON in gzip in base64 in a body",
        "powertools_json(powertools_base64_gzip(body)).items[0]",
        {"body": PACKED},
        {"body": PACKED, "at": 1},
    ),
    *(
        selects(f"one field of {name} is the key", "id", PAYLOADS[name], {"id": identifier})
        for name, identifier in {
            "a dataclass": 1,
            "a pydantic model": 3,
            "an event wrapper": 7,
            "an object with dict()": 8,
        }.items()
    ),
    Scenario(
        title="an event that is a list",
        feature=Feature.KEY_BY_JMESPATH,
        function=functions.handle,
        handler=True,
        config={"event_key_jmespath": "[0].id"},
        steps=(Call([{"id": 1}, 2]), Call([{"id": 1}, 3])),
    ),
    Scenario(
        title="jmespath_options replace the built-in functions",
        feature=Feature.KEY_BY_JMESPATH,
        config={"event_key_jmespath": "doubled(id)", "jmespath_options": {"custom_functions": Doubling()}},
    ),
    Scenario(
        title="a key of a handler's event",
        feature=Feature.KEY_BY_JMESPATH,
        function=functions.handle,
        handler=True,
        config={"event_key_jmespath": "powertools_json(body).order_id"},
        steps=(Call({"body": BODY}), Call({"body": BODY, "at": 1}), Call({"body": '{"order_id": "o-2"}'})),
    ),
    Scenario(
        title="a payload on which the expression fails",
        differs=differ(
            "key-errors", ("answer", "raised IdempotencyPersistenceLayerError", "raised IdempotencyKeyError", 1, 2)
        ),
        feature=Feature.KEY_BY_JMESPATH,
        config={"event_key_jmespath": "powertools_json(body)"},
        steps=(Call({"body": "no JSON"}), Call({"body": 1})),
    ),
    Scenario(
        title="an expression that is none",
        differs=differ(
            "checked-at-once",
            ("answer", "returned 'a function'", "raised IdempotencyConfigError", 0),
            ("answer", "raised IncompleteExpressionError", "not reached", 1),
        ),
        feature=Feature.KEY_BY_JMESPATH,
        config={"event_key_jmespath": "id["},
        steps=(Call(ORDER),),
    ),
)

WHOLE = (
    Scenario(
        title="the whole payload, whatever the order of its keys",
        feature=Feature.WHOLE_PAYLOAD,
        steps=(Call(ORDER), Call(dict(reversed(ORDER.items()))), Call(ORDER | {"amount": 3})),
    ),
    *(
        Scenario(title=f"{name} as payload", feature=Feature.PAYLOADS, steps=(Call(payload), Call(payload)))
        for name, payload in PAYLOADS.items()
    ),
    Scenario(
        title="an event wrapper as the event of a handler",
        feature=Feature.PAYLOADS,
        function=functions.handle,
        handler=True,
        config={"event_key_jmespath": "id"},
        steps=(Call(functions.Wrapper()), Call({"id": 7})),
    ),
    *(
        Scenario(
            title=f"{name} as payload",
            feature=Feature.PAYLOADS,
            steps=(Call(payload),),
            differs=differ(
                "key-errors", ("answer", "raised IdempotencyPersistenceLayerError", "raised IdempotencyKeyError", 1)
            ),
        )
        for name, payload in {
            "a set": {"ids": {1, 2}},
            "bytes": {"id": b"1"},
            "keys of mixed types": {1: "a", "b": 2},
            "any object": functions.Currency,
        }.items()
    ),
    Scenario(
        title="a model with a secret that its dump masks",
        feature=Feature.PAYLOADS,
        steps=(Call(functions.Card(number=SecretStr("4242"))), Call(functions.Card(number=SecretStr("5555")))),
        differs=differ(
            "hidden-by-dumps",
            ("answer", "returned {'paid': True, 'run': 1}", "raised IdempotencyKeyError", 1, 2),
            ("ran", "[{'order': Card(number=SecretStr('**********'), name='Ada')}]", "nothing", 1),
            ("records.status", "'COMPLETED'", "absent", 1, 2),
        ),
    ),
    Scenario(
        title="a field beside a secret",
        feature=Feature.PAYLOADS,
        config={"event_key_jmespath": "name"},
        steps=(Call(functions.Card(number=SecretStr("4242"))), Call(functions.Card(number=SecretStr("5555")))),
    ),
    Scenario(
        title="a body that changes its payload",
        feature=Feature.WHOLE_PAYLOAD,
        function=functions.changing_its_payload,
        steps=(Call({"id": 1, "items": [1]}), Call({"id": 1, "items": [1]})),
    ),
    *(
        Scenario(
            title=f"by {hash_function}",
            feature=Feature.WHOLE_PAYLOAD,
            config={"hash_function": hash_function},
        )
        for hash_function in ("md5", "sha256", "sha3_512", "blake2b")
    ),
)

MISSING = (
    *(
        Scenario(
            title=f"{nothing!r} is no key",
            feature=Feature.REQUIRED_KEYS,
            config={"event_key_jmespath": "id"},
            steps=(Call({"id": nothing}), Call({"id": nothing})),
        )
        for nothing in (None, "", [], {}, [None], {"a": None})
    ),
    Scenario(
        title="a payload without the field",
        feature=Feature.REQUIRED_KEYS,
        config={"event_key_jmespath": "id"},
        steps=(Call({}), Call({"amount": 2})),
    ),
    Scenario(
        title="a payload that is none, without an expression",
        feature=Feature.REQUIRED_KEYS,
        steps=(Call(None), Call({}), Call("")),
    ),
    Scenario(
        title="several fields, none of them there",
        feature=Feature.REQUIRED_KEYS,
        config={"event_key_jmespath": "[id, amount]"},
        steps=(Call({}), Call({})),
    ),
    Scenario(
        title="a missing key is an error if that is asked for",
        feature=Feature.REQUIRED_KEYS,
        config={"event_key_jmespath": "id", "raise_on_no_idempotency_key": True},
        steps=(Call({}), Call(ORDER)),
    ),
    Scenario(
        title="a body without a key that fails",
        feature=Feature.REQUIRED_KEYS,
        config={"event_key_jmespath": "id"},
        body=functions.raising(LookupError()),
        steps=(Call({}),),
    ),
)

VALIDATION = (
    Scenario(
        title="another payload under the key of a completed record",
        differs=differ(
            "redis-validation",
            ("records.validation", "absent", "'c81e728d9d4c2f636f067f89cc14862c'", 1, 2),
            stores=("redis",),
        ),
        feature=Feature.VALIDATION,
        config=VALIDATED,
        steps=(Call(ORDER), Call(ORDER | {"amount": 3})),
    ),
    Scenario(
        title="the same payload under its key",
        differs=differ(
            "redis-validation",
            ("records.validation", "absent", "'c81e728d9d4c2f636f067f89cc14862c'", 1, 2),
            ("answer", "raised IdempotencyValidationError", "returned {'paid': True, 'run': 1}", 2),
            stores=("redis",),
        ),
        feature=Feature.VALIDATION,
        config=VALIDATED,
        steps=(Call(ORDER), Call(ORDER | {"note": "other"})),
    ),
    Scenario(
        title="what is validated is in JSON in the body",
        feature=Feature.VALIDATION,
        config={"event_key_jmespath": "id", "payload_validation_jmespath": "powertools_json(body).order_id"},
        steps=(Call({"id": 1, "body": BODY}), Call({"id": 1, "body": f" {BODY}"}), Call({"id": 1, "body": "{}"})),
        stores=("dynamodb", "own"),
    ),
    Scenario(
        title="another payload while the first one runs",
        feature=Feature.VALIDATION,
        config=VALIDATED,
        steps=(
            Call(ORDER),
            Change({"status": "INPROGRESS", "in_progress_expiration": AHEAD, "data": None, "owner": None}),
            Call(ORDER | {"amount": 3}),
        ),
        stores=("dynamodb", "own"),
    ),
    Scenario(
        title="the validated part is not there",
        feature=Feature.VALIDATION,
        config=VALIDATED,
        steps=(Call({"id": 1}), Call({"id": 1, "note": "other"}), Call(ORDER)),
        stores=("dynamodb", "own"),
    ),
    Scenario(
        title="another payload once the record has expired",
        feature=Feature.VALIDATION,
        config=VALIDATED,
        steps=(Call(ORDER), Change({"expiration": AGO}), Call(ORDER | {"amount": 3})),
        stores=("dynamodb", "own"),
    ),
    Scenario(
        title="another payload, and the record is in the cache",
        feature=Feature.VALIDATION,
        config=VALIDATED | {"use_local_cache": True},
        steps=(Call(ORDER), Call(ORDER | {"amount": 3}), Call(ORDER)),
        stores=("dynamodb", "own"),
    ),
)

# What is a key does not depend on the store.
SCENARIOS = (
    *(dataclasses.replace(scenario, stores=("redis", "own")) for scenario in BY_JMESPATH + WHOLE + MISSING),
    *VALIDATION,
)
