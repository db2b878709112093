"""Scenarios of results: what is stored, what a replay returns, and what the first call does."""

from __future__ import annotations

import datetime
import decimal
from typing import Any

from tests.differential import functions
from tests.differential.functions import FullReceipt, Money, Receipt, ReceiptModel, returning
from tests.differential.scenario import ORDER, Call, Change, Differs, Feature, Scenario, differ
from tests.differential.sides import Of


def result(value: Any, differs: tuple[Differs, ...] = (), *, title: str = "", **more: Any) -> Scenario:
    return Scenario(
        title=title or f"a result of {value!r}",
        feature=Feature.FUNCTION,
        body=returning(value),
        differs=differs,
        **more,
    )


def unstorable(shown: str) -> tuple[Differs, ...]:
    return differ(
        "unstorable-results",
        ("answer", "raised IdempotencyPersistenceLayerError", f"returned {shown}", 1),
        ("warned", "nothing", "result not stored", 1),
        ("answer", "raised IdempotencyAlreadyInProgressError", "raised IdempotencyResultUnavailableError", 2),
        ("records.status", "'INPROGRESS'", "'COMPLETED'", 1, 2),
    )


FALSY: tuple[Any, ...] = (0, False, "", [], {})
PLAIN = (
    result(
        {"text": "Zürich 東京 🐙", "nested": {"none": None, "list": [None, 1, 2.5, True]}},
        title="a result of JSON data",
    ),
    result([1, "two", None]),
    result("text"),
    result(2**63),
    result(None),
    *(result(value, differ("falsy-results", ("answer", "returned None", f"returned {value!r}", 2))) for value in FALSY),
    result(
        {"b": 1, "a": (1, 2)},
        differ("first-result", ("answer", "returned {'a': (1, 2), 'b': 1}", "returned {'a': [1, 2], 'b': 1}", 1)),
        title="a tuple in the result",
    ),
    result(
        {1: "a"},
        differ("first-result", ("answer", "returned {1: 'a'}", "returned {'1': 'a'}", 1)),
        title="numbers as keys of the result",
    ),
    result(
        {"price": decimal.Decimal("1.10")},
        differ("first-result", ("answer", "returned {'price': Decimal('1.10')}", "returned {'price': '1.10'}", 1)),
        title="a Decimal in the result",
    ),
    result(
        {"at": datetime.date(2026, 1, 2)},
        differ(
            "more-results",
            ("answer", "raised IdempotencyPersistenceLayerError", "returned {'at': '2026-01-02'}", 1),
            ("answer", "raised IdempotencyAlreadyInProgressError", "returned {'at': '2026-01-02'}", 2),
            ("records.status", "'INPROGRESS'", "'COMPLETED'", 1, 2),
        ),
        title="a date in the result",
    ),
    result(float("nan"), title="a result of NaN"),
    result({1, 2}, unstorable("{1, 2}"), title="a result that cannot be stored"),
    result(
        "x" * 410_000,
        unstorable("410000 characters"),
        title="a result that is too large for DynamoDB",
        stores=("dynamodb",),
    ),
)

SERIALIZED = (
    Scenario(
        title="a dataclass by the serializer's class",
        feature=Feature.SERIALIZERS,
        function=functions.returns_receipt,
        body=returning(Receipt(1)),
        options={"output_serializer": Of("DataclassSerializer")},
    ),
    Scenario(
        title="a dataclass by a serializer",
        feature=Feature.SERIALIZERS,
        body=returning(Receipt(1)),
        options={"output_serializer": Of("DataclassSerializer", (Receipt,))},
    ),
    Scenario(
        title="a dataclass in a dataclass by a serializer",
        differs=differ(
            "nested-dataclasses",
            (
                "answer",
                "returned FullReceipt(order=1, money={'amount': 2, 'currency': 'EUR'})",
                "returned FullReceipt(order=1, money=Money(amount=2, currency='EUR'))",
                2,
            ),
        ),
        feature=Feature.SERIALIZERS,
        function=functions.returns_full_receipt,
        body=returning(FullReceipt(1, Money(2))),
        options={"output_serializer": Of("DataclassSerializer")},
    ),
    Scenario(
        title="a pydantic model by the serializer's class",
        feature=Feature.SERIALIZERS,
        function=functions.returns_model,
        body=returning(ReceiptModel(order=1)),
        options={"output_serializer": Of("PydanticSerializer")},
    ),
    Scenario(
        title="a pydantic model by a serializer",
        feature=Feature.SERIALIZERS,
        body=returning(ReceiptModel(order=1)),
        options={"output_serializer": Of("PydanticSerializer", (ReceiptModel,))},
    ),
    Scenario(
        title="an optional pydantic model by the serializer's class",
        feature=Feature.SERIALIZERS,
        function=functions.returns_optional_model,
        body=returning(ReceiptModel(order=1)),
        options={"output_serializer": Of("PydanticSerializer")},
    ),
    Scenario(
        title="None where an optional model is returned",
        feature=Feature.SERIALIZERS,
        function=functions.returns_optional_model,
        body=returning(None),
        options={"output_serializer": Of("PydanticSerializer")},
    ),
    Scenario(
        title="functions for both directions",
        feature=Feature.SERIALIZERS,
        body=returning(Receipt(1)),
        options={"output_serializer": Of("CustomDictSerializer", (functions.fields_of, functions.receipt_of))},
    ),
    Scenario(
        title="a serializer of one's own",
        feature=Feature.SERIALIZERS,
        body=returning(Receipt(1)),
        options={"output_serializer": functions.OwnSerializer()},
    ),
    Scenario(
        title="a serializer's class of one's own",
        feature=Feature.SERIALIZERS,
        function=functions.returns_receipt,
        body=returning(Receipt(1)),
        options={"output_serializer": functions.OwnModelSerializer},
    ),
    Scenario(
        title="a serializer's class for a function whose annotation is a string",
        differs=differ(
            "late-annotations",
            ("answer", "raised IdempotencyModelTypeError", "returned 'a function'", 0),
            ("answer", "not reached", "returned Receipt(order=1)", 1, 2),
        ),
        feature=Feature.SERIALIZERS,
        function=functions.returns_receipt_in_a_string,
        body=returning(Receipt(1)),
        options={"output_serializer": Of("DataclassSerializer")},
    ),
    Scenario(
        title="a serializer's class for a function without annotation",
        differs=differ(
            "late-annotations",
            ("answer", "raised IdempotencyNoSerializationModelError", "returned 'a function'", 0),
            ("answer", "not reached", "raised IdempotencyNoSerializationModelError", 1),
        ),
        feature=Feature.SERIALIZERS,
        body=returning(Receipt(1)),
        options={"output_serializer": Of("DataclassSerializer")},
        steps=(Call(ORDER),),
    ),
    Scenario(
        title="a serializer's class that does not suit the annotation",
        differs=differ(
            "late-annotations",
            ("answer", "raised IdempotencyModelTypeError", "returned 'a function'", 0),
            ("answer", "not reached", "raised IdempotencyModelTypeError", 1),
        ),
        feature=Feature.SERIALIZERS,
        function=functions.returns_text,
        body=returning("text"),
        options={"output_serializer": Of("DataclassSerializer")},
        steps=(Call(ORDER),),
    ),
    Scenario(
        title="an annotated dataclass without a serializer",
        differs=differ("deduced-serializers", ("answer", "returned {'order': 1}", "returned Receipt(order=1)", 2)),
        feature=Feature.SERIALIZERS,
        function=functions.returns_receipt,
        body=returning(Receipt(1)),
    ),
    Scenario(
        title="an annotated Decimal without a serializer",
        differs=differ("deduced-serializers", ("answer", "returned '1.10'", "returned Decimal('1.10')", 2)),
        feature=Feature.SERIALIZERS,
        function=functions.returns_price,
        body=returning(decimal.Decimal("1.10")),
    ),
    Scenario(
        title="annotated bytes in a set",
        differs=differ(
            "more-results",
            ("answer", "raised IdempotencyPersistenceLayerError", "returned {b'a'}", 1),
            ("answer", "raised IdempotencyAlreadyInProgressError", "returned {b'a'}", 2),
            ("records.status", "'INPROGRESS'", "'COMPLETED'", 1, 2),
        ),
        feature=Feature.SERIALIZERS,
        function=functions.returns_blobs,
        body=returning({b"a"}),
    ),
    Scenario(
        title="a model with more in it than the annotation of its field says",
        differs=differ(
            "hidden-results",
            (
                "answer",
                "returned Statement(receipt=ReceiptModel(order=1, on=datetime.date(2026, 1, 2)))",
                "raised IdempotencyResultUnavailableError",
                2,
            ),
            ("warned", "nothing", "result not stored", 1),
            (
                "records.data",
                """'{"receipt": {"on": "2026-01-02", "order": 1}}'""",
                "'aidem:unavailable'",
                1,
                2,
            ),
            ("records.outcome", "absent", "'unavailable'", 1, 2),
        ),
        feature=Feature.SERIALIZERS,
        function=functions.returns_statement,
        body=returning(functions.Statement(receipt=functions.CardReceipt(order=1, card="4242"))),
        options={"output_serializer": Of("PydanticSerializer")},
    ),
    Scenario(
        title="a dataclass without serializer and annotation",
        differs=differ("first-result", ("answer", "returned Receipt(order=1)", "returned {'order': 1}", 1)),
        feature=Feature.SERIALIZERS,
        body=returning(Receipt(1)),
    ),
    Scenario(
        title="a stored result that does not fit its model any more",
        differs=differ(
            "unreadable-results", ("answer", "raised ValidationError", "raised IdempotencyResultUnavailableError", 3)
        ),
        feature=Feature.SERIALIZERS,
        function=functions.returns_model,
        body=returning(ReceiptModel(order=1)),
        options={"output_serializer": Of("PydanticSerializer")},
        steps=(Call(ORDER), Change({"data": '{"order": "none"}'}), Call(ORDER)),
    ),
)

STORED = (
    Scenario(
        title="a stored result that cannot be decoded",
        differs=differ(
            "unreadable-results", ("answer", "raised JSONDecodeError", "raised IdempotencyResultUnavailableError", 3)
        ),
        feature=Feature.PERSISTENCE_ERRORS,
        steps=(Call(ORDER), Change({"data": "no JSON"}), Call(ORDER)),
    ),
    Scenario(
        title="a completed record without a result",
        feature=Feature.PERSISTENCE_ERRORS,
        steps=(Call(ORDER), Change({"data": None}), Call(ORDER)),
    ),
    Scenario(
        title="a record with a status that nobody knows",
        feature=Feature.PERSISTENCE_ERRORS,
        steps=(Call(ORDER), Change({"status": "PAUSED", "in_progress_expiration": None}), Call(ORDER)),
        stores=("dynamodb", "redis"),
    ),
)

HOOKS = (
    Scenario(
        title="a response hook changes what a replay returns",
        feature=Feature.HOOK,
        config={"response_hook": functions.marking_hook},
    ),
    Scenario(
        title="a response hook of a replay from the cache",
        feature=Feature.HOOK,
        config={"response_hook": functions.marking_hook, "use_local_cache": True},
    ),
    Scenario(
        title="a response hook gets what the serializer makes",
        feature=Feature.HOOK,
        function=functions.returns_receipt,
        body=returning(Receipt(1)),
        options={"output_serializer": Of("DataclassSerializer")},
        config={"response_hook": functions.naming_hook},
    ),
    Scenario(
        title="a response hook reads the record",
        feature=Feature.HOOK,
        config={"response_hook": functions.reading_hook},
    ),
    Scenario(
        title="a response hook reads the record of a composite key",
        feature=Feature.HOOK,
        layer="composite",
        options={"key_prefix": "pay"},
        config={"response_hook": functions.keys_hook},
        differs=differ("composite-keys", ("answer", "returned ['payments', 'pay']", "returned ['pay', 'pay']", 2)),
        stores=("dynamodb",),
    ),
    Scenario(
        title="a response hook that returns nothing",
        feature=Feature.HOOK,
        config={"response_hook": functions.silent_hook},
    ),
    Scenario(
        title="a response hook asks when the record expires",
        differs=differ("aware-datetimes", ("answer", "returned 'naive'", "returned 'aware'", 2)),
        feature=Feature.HOOK,
        config={"response_hook": functions.timing_hook},
    ),
    Scenario(
        title="a response hook that fails",
        feature=Feature.HOOK,
        config={"response_hook": functions.failing_hook},
    ),
)

SCENARIOS = PLAIN + SERIALIZED + STORED + HOOKS
