"""Where aidem means to differ from Powertools: the migration page shows this list, scenarios show that it is true.

python -m tests.differential.differences      # the text for docs/migration.md
"""

from __future__ import annotations

import textwrap
from dataclasses import dataclass


@dataclass(frozen=True)
class Intended:
    """One difference.

    Attributes:
        id: Scenarios refer to it by this name.
        what: What it is about.
        powertools: What Powertools does.
        aidem: What aidem does.
        why: Why it differs.
    """

    id: str
    what: str
    powertools: str
    aidem: str
    why: str


INTENDED = (
    # --- Keys ---
    Intended(
        "default-hash",
        "The hash in keys",
        "`hash_function` is md5 by default.",
        '`hash_function` is sha256 by default. Set `hash_function="md5"` to find the records of Powertools.',
        "md5 is broken: someone who chooses payloads could make two of them with one key.",
    ),
    Intended(
        "key-errors",
        "A payload that cannot be a key, or on which the expression fails",
        "`IdempotencyPersistenceLayerError`.",
        "`IdempotencyKeyError`, which names the path to the value.",
        "The store is not the cause, and a retry does not help.",
    ),
    Intended(
        "hidden-by-dumps",
        "A pydantic model in the payload whose dump masks a secret, drops the fields of a subclass where an annotation "
        "names its base, or writes two values alike",
        "The key is made from the rest: two cards with masked numbers have one key.",
        "`IdempotencyKeyError`, if the key or the validated part is made from it. Select other fields, or make the key "
        "with `key=`. Sets in models are sorted.",
        "Different calls must not get each other's result, and one call must have the same key in every process.",
    ),
    Intended(
        "nothing-deeper",
        'A key of nothing but `None`, `""` and empty containers below the first level, such as `[[null, null]]`',
        "A key, which all payloads share that lack the selected fields.",
        "No key: the call runs without idempotency, or is refused with `raise_on_no_idempotency_key`.",
        "Unrelated events must not get each other's result.",
    ),
    Intended(
        "positional-payload",
        "The payload of `idempotent_function` by position, or left at its default",
        "`RuntimeError`: it must be passed by keyword.",
        "Found however it is passed.",
        "A call that Python allows should not fail because of a decorator.",
    ),
    # --- Options ---
    Intended(
        "checked-at-once",
        "Options that cannot work: a broken expression, an unknown hash, a window of no time, a payload that the "
        "signature does not name, a lambda expression without `key_prefix`",
        "Found by the first call that needs them, or never.",
        "Refused where they are given, with `IdempotencyConfigError`.",
        "A deployment should fail, not the first payment after it.",
    ),
    Intended(
        "unknown-options",
        "An option that does not exist",
        "`idempotent_function` ignores it.",
        "`TypeError`.",
        "A misspelt `key_prefix` would be ignored without notice.",
    ),
    Intended(
        "frozen-config",
        "`IdempotencyConfig`",
        "Takes settings by position, and they may be changed later.",
        "Takes settings by keyword, and is frozen. `register_lambda_context` is still there.",
        "One config is shared by functions and threads, and what is fixed at import cannot race.",
    ),
    Intended(
        "shared-layer",
        "One layer for several functions",
        "The layer keeps the settings of the first function and the name of the last one that was called: a second "
        "config is ignored, and where one function calls another the outer one's result is stored under the inner "
        "one's key.",
        "Every call has its own settings and key.",
        "A layer is a connection to a store, which functions should be able to share.",
    ),
    Intended(
        "empty-switch",
        "`POWERTOOLS_IDEMPOTENCY_DISABLED` set to nothing",
        "Every call fails with `ValueError`.",
        "Idempotency is on.",
        "Templates set empty variables.",
    ),
    # --- What may be decorated, and where it may run ---
    Intended(
        "async-functions",
        "An `async def` function",
        "Accepted: nothing is stored, and its record stays INPROGRESS.",
        "`TypeError` from `aidem.sync`, which names the decorator for it.",
        "An idempotent async function is what `aidem.idempotent` and `aidem.idempotent_function` are for.",
    ),
    Intended(
        "event-loop",
        "A call on a thread that runs an event loop",
        "Blocks the loop.",
        "`IdempotencyUsageError` from `aidem.sync`.",
        "Everything else on the loop would stand still for the time of the call.",
    ),
    # --- Results ---
    Intended(
        "falsy-results",
        'Results `0`, `False`, `""`, `[]` and `{}`',
        "Replayed as `None`.",
        "Replayed as themselves.",
        "A replay should be what the first call returned.",
    ),
    Intended(
        "first-result",
        "A result that JSON changes: a tuple, a Decimal, keys that are numbers, a dataclass without annotation",
        "The first call returns it as it is, a replay what JSON makes of it.",
        "Both return the type in the return annotation, such as `-> Decimal`; without one, the JSON value.",
        "Code that works with the first result should not fail on a retry.",
    ),
    Intended(
        "more-results",
        "Results with dates, times, UUIDs, paths and enums; bytes, sets and durations where the annotation names them",
        "Cannot be stored, see the next point.",
        "Stored as their text.",
        "They may be in payloads, too.",
    ),
    Intended(
        "hidden-results",
        "A result with a model whose dump hides something: a `SecretStr`, what a subclass adds in a field that is "
        "annotated with its base class, what a serializer drops",
        "The first call returns it as it is, a replay without what was hidden.",
        "Cannot be stored, see the next point.",
        "A replay should be what the first call returned, and `**********` is no card number.",
    ),
    Intended(
        "unstorable-results",
        "A result that cannot be stored, because it is not JSON or too large",
        "`IdempotencyPersistenceLayerError`, though the function has run. Its record stays INPROGRESS; once that has "
        "timed out the function runs again.",
        "The first caller gets the result, with a logged error and a warning. Later ones get "
        "`IdempotencyResultUnavailableError`, and the function does not run again.",
        "The effect has happened, and must not happen again.",
    ),
    Intended(
        "unreadable-results",
        "A stored result that cannot be decoded, or does not fit its model any more",
        "The error of the decoder or of the model.",
        "`IdempotencyResultUnavailableError`.",
        "Callers can tell it from an error of their own.",
    ),
    Intended(
        "nested-dataclasses",
        "A dataclass in a dataclass, by `DataclassSerializer`",
        "Replayed with a dict in it.",
        "Replayed as it was.",
        "A replay should be what the first call returned.",
    ),
    Intended(
        "deduced-serializers",
        "A function that is annotated to return a dataclass, a pydantic model or a type of the standard library such "
        "as `Decimal`, without `output_serializer`",
        "A replay returns a dict or a text.",
        "A replay returns what is annotated. A result that does not fit its model, such as `None` in a field that is "
        "annotated `str`, cannot be stored, see above.",
        "Callers rely on the annotation.",
    ),
    Intended(
        "late-annotations",
        "A serializer's class as `output_serializer`",
        "Looks at the annotation when the function is decorated, and fails where annotations are strings "
        "(`from __future__ import annotations`).",
        "Looks at it at the first call, before the function runs, when every name is there. Errors come then, too.",
        "Annotations may name what is defined further down.",
    ),
    Intended(
        "aware-datetimes",
        "`get_expiration_datetime()` of the record that a response hook gets",
        "Naive, in the zone of the machine.",
        "Aware, in UTC.",
        "A naive time is wrong on another machine.",
    ),
    Intended(
        "composite-keys",
        "`idempotency_key` of the record that a response hook gets, in a table with a composite key",
        "The value of the partition key; the key is in `sort_key`.",
        "The key, which is in `sort_key` as well.",
        "It names the call, wherever it is stored.",
    ),
    # --- Claims ---
    Intended(
        "lease-without-context",
        "A call without a Lambda context",
        "Its claim holds until the record expires, and every call warns.",
        "Its claim holds for `lease_seconds`, 30, and is renewed while the function runs.",
        "A process that was killed should not block its key for an hour.",
    ),
    Intended(
        "context-per-call",
        "The context that a handler was called with",
        "Stays in the config until another one comes.",
        "Counts for this call, and for what it calls in its thread or task.",
        "A claim that is made later must not last as long as an invocation that is over.",
    ),
    Intended(
        "context-without-time",
        "A context without `get_remaining_time_in_millis`",
        "`IdempotencyPersistenceLayerError`.",
        "Ignored.",
        "Tests call handlers with contexts of all kinds.",
    ),
    Intended(
        "past-deadline",
        "An invocation without any time left",
        "Its claim has lapsed when it is made.",
        "Its claim holds for a second.",
        "Kills come late: up to then the function runs, and must not run twice at once.",
    ),
    Intended(
        "lease-past-window",
        "A time-out that is longer than `expires_after_seconds`",
        "The claim expires while its function runs.",
        "The claim expires with its lease at the earliest; the window counts from completion.",
        "Another call could run at the same time.",
    ),
    Intended(
        "completed-lease",
        "`in_progress_expiration` of a completed item in DynamoDB",
        "Stays.",
        "Is removed.",
        "It means nothing any more. Powertools does not miss it.",
    ),
    Intended(
        "late-owners",
        "A call that lost its key to another one, and then ends",
        "Overwrites the other's record, or deletes it.",
        "Changes nothing, and returns the other's result.",
        "Everyone who gets a result should get the same one.",
    ),
    Intended(
        "durable-without-owner",
        "A durable function that replays, and finds a claim that Powertools has made",
        "Runs, as it does for any claim.",
        "`IdempotencyAlreadyInProgressError`. Of its own claims it takes over, and of two replays one wins.",
        "Its owner is unknown. Let running durable functions end before you deploy.",
    ),
    # --- Failures ---
    Intended(
        "base-exceptions",
        "A function ended by `KeyboardInterrupt`, `SystemExit` or another `BaseException`",
        "Its record stays INPROGRESS.",
        "Its key is released, as for any exception.",
        "A retry should not have to wait for the time-out.",
    ),
    Intended(
        "own-exceptions",
        "A function raises, and its key cannot be released",
        "`IdempotencyPersistenceLayerError` in place of the exception.",
        "The exception, with a note.",
        "The exception is the first cause.",
    ),
    # --- Redis ---
    Intended(
        "redis-validation",
        "Payload validation on Redis",
        "The completed record loses its hash, and every identical retry is refused with `IdempotencyValidationError`.",
        "The hash is kept, and an identical retry is a replay.",
        "That is what validation is for.",
    ),
    Intended(
        "redis-names",
        "A configured `expiry_attr` on Redis",
        "Written, but not read: a record that has expired counts until Redis has removed it.",
        "Written and read.",
        "The name should mean the same both ways.",
    ),
)


def as_page() -> str:
    """Return the list as the migration page shows it."""
    return "\n\n".join(map(_entry, INTENDED))


def _entry(intended: Intended) -> str:
    what = _wrapped(f"**{intended.what}.**")
    points = (
        f"Powertools: {intended.powertools}",
        f"aidem: {intended.aidem}",
        f"Why: {intended.why}",
    )
    return "\n".join([what, "", *(_wrapped(f"- {point}", indent="  ") for point in points)])


def _wrapped(text: str, indent: str = "") -> str:
    return textwrap.fill(text, 120, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


if __name__ == "__main__":
    print(as_page())  # noqa: T201 - to be pasted
