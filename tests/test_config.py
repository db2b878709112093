"""`IdempotencyConfig`, the defaults of the process, and the Lambda context of a task."""

from __future__ import annotations

import asyncio
import collections
import copy
import dataclasses
import hashlib
import logging
import pickle
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import jmespath
import pytest
from jmespath.functions import Functions, signature

import aidem
from aidem import (
    IdempotencyConfig,
    configure,
    current_execution,
    idempotency,
    idempotent_function,
    register_lambda_context,
)
from aidem.config import current_lambda_context, default_persistence_store, reset_lambda_context
from aidem.exceptions import IdempotencyConfigError, IdempotencyPersistenceConfigError, IdempotencyUsageError
from aidem.persistence.memory import MemoryPersistenceLayer
from aidem.persistence.sqlite import SQLitePersistenceLayer
from tests.support.planned import Listener

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


class LambdaContext:
    def get_remaining_time_in_millis(self) -> int:
        return 10_000


@pytest.fixture(autouse=True)
def nothing_configured(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("AIDEM_PERSISTENCE", "AWS_LAMBDA_FUNCTION_NAME"):
        monkeypatch.delenv(name, raising=False)
    configure()
    yield
    configure()


@pytest.fixture
def forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the process forget the default layer that an earlier test has opened."""
    monkeypatch.setenv("AIDEM_PERSISTENCE", "memory://")
    default_persistence_store()
    monkeypatch.delenv("AIDEM_PERSISTENCE")


# --- IdempotencyConfig ------------------------------------------------------------------------------------------------


def test_the_defaults_are_those_of_the_table() -> None:
    assert dataclasses.asdict(IdempotencyConfig()) == {
        "event_key_jmespath": "",
        "payload_validation_jmespath": "",
        "jmespath_options": None,
        "max_inflated_bytes": 4 * 1024**2,
        "raise_on_no_idempotency_key": False,
        "expires_after_seconds": 3600,
        "use_local_cache": False,
        "local_cache_max_items": 256,
        "hash_function": "sha256",
        "response_hook": None,
        "lambda_context": None,
        "lease_seconds": 30.0,
        "renew_lease": True,
        "wait_timeout_seconds": 0.0,
        "on_abandoned": "run_again",
        "doubt_kept_seconds": 604_800,
        "on_persistence_error": "raise",
        "stored_exceptions": (),
        "max_clock_skew_seconds": 0.0,
        "hooks": (),
        "note": None,
    }


def test_a_config_is_frozen_keyword_only_and_has_no_other_fields() -> None:
    config = IdempotencyConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.hash_function = "md5"  # type: ignore[misc]
    with pytest.raises((AttributeError, TypeError)):
        config.unknown = 1  # type: ignore[attr-defined]
    with pytest.raises(TypeError, match="unknown"):
        IdempotencyConfig(unknown=1)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="positional"):
        IdempotencyConfig("id")  # type: ignore[call-arg]


class AsyncListener:
    async def on_event(self, event: Any) -> None: ...


@dataclasses.dataclass
class UnhashableHook:
    """Dataclasses that can be compared cannot be hashed; hooks and contexts are written that way."""

    def on_event(self, event: Any) -> None: ...

    def get_remaining_time_in_millis(self) -> int:
        return 1

    def __call__(self, response: Any, record: Any) -> Any: ...


def test_a_config_can_be_hashed_compared_and_copied_whatever_is_in_it() -> None:
    unhashable = UnhashableHook()
    options: dict[str, Any] = {
        "hooks": (unhashable,),
        "response_hook": unhashable,
        "lambda_context": unhashable,
        "jmespath_options": {"dict_cls": dict},
        "stored_exceptions": (ValueError,),
    }
    one, other = IdempotencyConfig(**options), IdempotencyConfig(**options)
    assert one == other
    assert hash(one) == hash(other)
    assert one != IdempotencyConfig()
    assert hash(one) != hash(dataclasses.replace(one, hash_function="md5"))
    assert pickle.loads(pickle.dumps(one)) == copy.deepcopy(one) == one


DURATIONS = ("expires_after_seconds", "lease_seconds", "wait_timeout_seconds", "max_clock_skew_seconds")
TOO_LONG = (1e20, 1e308, float("inf"), sys.maxsize, 10**400, 3_155_760_001)


@pytest.mark.parametrize(
    ("setting", "value", "allowed"),
    [
        ("event_key_jmespath", None, "JMESPath expression as a string"),
        ("event_key_jmespath", "id[", "valid JMESPath expression"),
        ("payload_validation_jmespath", 3, "JMESPath expression as a string"),
        ("payload_validation_jmespath", "a b", "valid JMESPath expression"),
        ("jmespath_options", {"functions": 1}, r"jmespath\.Options"),
        ("jmespath_options", 3, r"jmespath\.Options"),
        ("jmespath_options", {"custom_functions": Functions}, "instance of"),
        ("jmespath_options", {"dict_cls": list}, "subclass of dict"),
        ("jmespath_options", {"dict_cls": {}}, "subclass of dict"),
        ("max_inflated_bytes", 0, "positive whole number"),
        ("max_inflated_bytes", 1e6, "positive whole number"),
        ("max_inflated_bytes", True, "positive whole number"),
        ("max_inflated_bytes", None, "positive whole number"),
        ("raise_on_no_idempotency_key", "false", "True or False"),
        ("raise_on_no_idempotency_key", 1, "True or False"),
        ("use_local_cache", None, "True or False"),
        ("renew_lease", "no", "True or False"),
        ("expires_after_seconds", 0, "positive number"),
        ("expires_after_seconds", -1, "positive number"),
        ("expires_after_seconds", float("nan"), "positive number"),
        ("expires_after_seconds", float("inf"), "positive number"),
        ("expires_after_seconds", True, "positive number"),
        ("expires_after_seconds", "60", "positive number"),
        ("expires_after_seconds", None, "positive number"),
        ("local_cache_max_items", 0, "positive whole number"),
        ("local_cache_max_items", 2.5, "positive whole number"),
        ("local_cache_max_items", True, "positive whole number"),
        ("hash_function", "shake_128", "it must be a hash of fixed length in hashlib, such as .*sha256"),
        ("hash_function", "nonsense", "sha256"),
        ("hash_function", hashlib.sha256, "sha256"),
        ("response_hook", "hook", r"hook\(response, record\)"),
        ("lambda_context", object(), "get_remaining_time_in_millis"),
        ("lease_seconds", 0, "positive number, at most .*, or None"),
        ("lease_seconds", "30", "positive number, at most .*, or None"),
        *((setting, value, r"at most 3155760000 \(100 years\)") for setting in DURATIONS for value in TOO_LONG),
        ("wait_timeout_seconds", -0.1, "not negative"),
        ("wait_timeout_seconds", None, "not negative"),
        ("wait_timeout_seconds", float("inf"), "not negative"),
        ("max_clock_skew_seconds", -1, "not negative"),
        ("on_abandoned", "ignore", "'run_again', 'raise'"),
        ("on_abandoned", [], "'run_again', 'raise'"),
        ("on_persistence_error", True, "'raise', 'run'"),
        ("stored_exceptions", ValueError, "tuple of subclasses of Exception"),
        ("stored_exceptions", [ValueError], "tuple of subclasses of Exception"),
        ("stored_exceptions", (KeyboardInterrupt,), "tuple of subclasses of Exception"),
        ("stored_exceptions", (ValueError(),), "tuple of subclasses of Exception"),
        ("hooks", Listener(), "tuple of objects with a method on_event"),
        ("hooks", [Listener()], "tuple of objects with a method on_event"),
        ("hooks", (print,), "tuple of objects with a method on_event"),
        ("hooks", (Listener,), "tuple of objects with a method on_event"),
        ("hooks", (AsyncListener(),), "that is not async"),
    ],
)
def test_a_wrong_setting_is_refused_at_once_with_its_name_and_what_is_allowed(
    setting: str, value: Any, allowed: str
) -> None:
    with pytest.raises(IdempotencyConfigError, match=f"(?s)^{setting}=.*{allowed}") as caught:
        IdempotencyConfig(**{setting: value})
    assert isinstance(caught.value, ValueError)
    assert isinstance(caught.value, IdempotencyUsageError)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("event_key_jmespath", "powertools_json(body).[user, id]"),
        ("jmespath_options", {}),
        ("jmespath_options", {"custom_functions": Functions()}),
        ("jmespath_options", {"custom_functions": None}),
        ("jmespath_options", {"dict_cls": collections.OrderedDict}),
        ("max_inflated_bytes", 1),
        ("expires_after_seconds", 0.5),
        ("local_cache_max_items", 1),
        ("hash_function", "md5"),
        ("hash_function", "blake2b"),
        ("response_hook", print),
        ("lambda_context", LambdaContext()),
        ("lease_seconds", None),
        ("lease_seconds", 1),
        ("wait_timeout_seconds", 2.5),
        ("max_clock_skew_seconds", 1),
        ("on_abandoned", "raise"),
        ("on_persistence_error", "run"),
        ("stored_exceptions", (ValueError, LookupError)),
        ("hooks", (Listener(), Listener())),
    ],
)
def test_a_right_setting_is_kept(setting: str, value: Any) -> None:
    assert getattr(IdempotencyConfig(**{setting: value}), setting) is value


class Dynamic(Functions):
    """Finds functions in a way of its own."""

    def call_function(self, function_name: str, resolved_args: Any) -> Any:
        return [function_name, *resolved_args]


class Shouting(Functions):
    @signature({"types": ["string"]})
    def _func_shout(self, text: str) -> str:
        return text.upper()

    @signature()
    def _func_now(self) -> int:
        return 1


@pytest.mark.parametrize("setting", ["event_key_jmespath", "payload_validation_jmespath"])
@pytest.mark.parametrize(
    ("expression", "functions", "reason"),
    [
        ("shout(id)", None, r"no function shout\(\), only abs, .*powertools_base64_gzip, powertools_json"),
        ("powertools_jsn(body).id", None, r"no function powertools_jsn\(\), only"),
        ("powertools_json(id)", Shouting(), r"no function powertools_json\(\), only abs, .*shout"),
        ("[a, {b: items[?nope(@)].id[0:1]}] | @", None, r"no function nope\(\)"),
        ("map(&nope(@), items)", None, r"no function nope\(\)"),
        ("a || !nope(b) && c", None, r"no function nope\(\)"),
        ("powertools_json()", None, r"powertools_json\(\) takes 1 arguments, and is given 0"),
        ("powertools_json(a, b)", None, r"powertools_json\(\) takes 1 arguments, and is given 2"),
        ("not_null()", None, r"not_null\(\) takes at least 1 arguments, and is given 0"),
        ("now(id)", Shouting(), r"now\(\) takes 0 arguments, and is given 1"),
    ],
)
def test_an_expression_whose_calls_can_never_work_is_refused_when_the_config_is_made(
    setting: str, expression: str, functions: Functions | None, reason: str
) -> None:
    options = functions and {"custom_functions": functions}
    with pytest.raises(IdempotencyConfigError, match=f"^{setting}=.*valid JMESPath expression.*{reason}"):
        IdempotencyConfig(**{setting: expression, "jmespath_options": options})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("expression", "options"),
    [
        ("not_null(a, b, c).id[::2] || items[?length(@) > `1`].[id]", None),
        ("powertools_json(powertools_base64_gzip(body)).id", {}),
        ("[shout(id), now(), length(items)]", {"custom_functions": Shouting()}),
        ("length(items)", {"dict_cls": dict}),
        ("whatever(id, `1`)", {"custom_functions": Dynamic()}),
    ],
)
def test_an_expression_whose_functions_are_known_is_accepted(expression: str, options: Any) -> None:
    config = IdempotencyConfig(event_key_jmespath=expression, jmespath_options=options)
    assert config.event_key_jmespath == expression


@pytest.mark.parametrize("layer", [MemoryPersistenceLayer, SQLitePersistenceLayer])
async def test_the_longest_durations_work(layer: Any, tmp_path: Path) -> None:
    durations: Any = dict.fromkeys(DURATIONS, 3_155_760_000)
    records: list[Any] = []

    @idempotent_function(
        persistence_store=layer(*[tmp_path / "records.db"][: layer is SQLitePersistenceLayer]),
        config=IdempotencyConfig(**durations, response_hook=lambda _, record: records.append(record)),
    )
    async def charge() -> None:
        await current_execution().ensure_owned()
        await asyncio.sleep(0.01)

    await asyncio.gather(charge(), charge())
    (record,) = records
    assert record.get_expiration_datetime().year > 2100


def test_at_most_once_and_running_without_the_store_exclude_each_other() -> None:
    with pytest.raises(IdempotencyConfigError, match=r"on_persistence_error='run'.*on_abandoned"):
        IdempotencyConfig(on_abandoned="raise", on_persistence_error="run")


def test_the_options_of_jmespath_are_the_words_of_jmespath() -> None:
    """A negative control of the test above: these are the words that jmespath itself takes."""
    assert jmespath.Options(custom_functions=Functions(), dict_cls=dict).dict_cls is dict


# --- configure --------------------------------------------------------------------------------------------------------


async def keys_of(layer: Any) -> list[str]:
    return list(layer.records())


async def test_configure_sets_the_layer_and_the_config_of_all_fronts() -> None:
    layer = MemoryPersistenceLayer()
    configure(persistence_store=layer, config=IdempotencyConfig(hash_function="md5"))

    @idempotent_function
    async def charge() -> None: ...

    await charge()
    async with idempotency("key") as execution:
        assert not execution.replayed
    assert [len(key.split("#")[1]) for key in await keys_of(layer)] == [32, 32]


async def test_what_a_front_is_given_goes_before_what_is_configured() -> None:
    layer, mine = MemoryPersistenceLayer(), MemoryPersistenceLayer()
    configure(persistence_store=layer, config=IdempotencyConfig(hash_function="md5"))
    config = IdempotencyConfig(hash_function="sha1")

    @idempotent_function(persistence_store=mine, config=config)
    async def charge() -> None: ...

    await charge()
    async with idempotency("key", persistence_store=mine, config=config) as execution:
        assert not execution.replayed
    assert [len(key.split("#")[1]) for key in await keys_of(mine)] == [40, 40]
    assert await keys_of(layer) == []


def test_configure_sets_both_defaults_at_once() -> None:
    configure(persistence_store=MemoryPersistenceLayer(), config=IdempotencyConfig(hash_function="md5"))
    configure(persistence_store=(layer := MemoryPersistenceLayer()))
    assert default_persistence_store() is layer
    assert aidem.config.default_config() == IdempotencyConfig()


@pytest.mark.parametrize(
    ("option", "value", "allowed"),
    [
        ("persistence_store", "redis://:secret@host", "persistence layer"),
        ("persistence_store", MemoryPersistenceLayer, "persistence layer"),
        ("config", {"hash_function": "md5"}, "IdempotencyConfig"),
    ],
)
def test_configure_refuses_what_is_no_layer_and_no_config(option: str, value: Any, allowed: str) -> None:
    options: Any = {option: value}
    with pytest.raises(IdempotencyConfigError, match=f"{option}=.*{allowed}") as caught:
        configure(**options)
    assert "secret" not in str(caught.value)


# --- The default layer ------------------------------------------------------------------------------------------------


def test_aidem_persistence_names_the_layer_and_it_is_opened_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("AIDEM_PERSISTENCE", "memory://")
    layer = default_persistence_store()
    assert isinstance(layer, MemoryPersistenceLayer)
    assert default_persistence_store() is layer
    monkeypatch.setenv("AIDEM_PERSISTENCE", f"sqlite:///{tmp_path}/orders.db")
    assert isinstance(default_persistence_store(), SQLitePersistenceLayer)


@pytest.mark.parametrize("url", ["nonsense", "memory://x", "mysql://:secret@host/db"])
def test_a_url_that_names_no_layer_is_refused_without_its_password(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AIDEM_PERSISTENCE", url)
    with pytest.raises(IdempotencyPersistenceConfigError) as caught:
        default_persistence_store()
    assert "secret" not in str(caught.value)


def test_threads_that_use_the_default_first_get_the_same_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(8) as pool:
            for attempt in range(100):
                monkeypatch.setenv("AIDEM_PERSISTENCE", f"sqlite:///{attempt}.db")
                barrier = threading.Barrier(8)

                def first_use(_: int, barrier: threading.Barrier = barrier) -> Any:
                    barrier.wait()
                    return default_persistence_store()

                assert len(set(pool.map(first_use, range(8)))) == 1
    finally:
        sys.setswitchinterval(before)


def test_without_any_setting_records_are_in_a_file_of_the_working_directory_and_its_path_is_logged_once(
    forgotten: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    with caplog.at_level(logging.WARNING, "aidem"):
        layer = default_persistence_store()
        monkeypatch.chdir("/")
        assert default_persistence_store() is layer
    assert isinstance(layer, SQLitePersistenceLayer)
    assert [(record.levelname, record.name) for record in caplog.records] == [("WARNING", "aidem")]
    assert str(tmp_path / "aidem.sqlite3") in caplog.text
    assert list(tmp_path.iterdir()) == []  # nothing is opened before the first use
    asyncio.run(use(layer))
    assert (tmp_path / "aidem.sqlite3").exists()


async def use(layer: SQLitePersistenceLayer) -> None:
    async with layer, idempotency("key") as execution:
        assert not execution.replayed


def test_on_lambda_the_default_is_refused(forgotten: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_LAMBDA_FUNCTION_NAME", "billing")
    with pytest.raises(IdempotencyPersistenceConfigError, match=r"on Lambda .*persistence_store="):
        default_persistence_store()
    monkeypatch.setenv("AIDEM_PERSISTENCE", "memory://")
    assert isinstance(default_persistence_store(), MemoryPersistenceLayer)


async def test_on_lambda_a_function_without_a_layer_does_not_run(
    forgotten: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    @idempotent_function
    async def charge() -> None:
        pytest.fail("the function ran")

    monkeypatch.setenv("AWS_LAMBDA_FUNCTION_NAME", "billing")
    with pytest.raises(IdempotencyPersistenceConfigError):
        await charge()


# --- The Lambda context -----------------------------------------------------------------------------------------------


async def leases_of(config: IdempotencyConfig, layer: MemoryPersistenceLayer) -> float:
    async with idempotency("key", persistence_store=layer, config=config) as execution:
        assert not execution.replayed
        record = execution.record
        assert record is not None
        assert record.in_progress_expiry_timestamp is not None
        await layer.forget(record.idempotency_key)
    await layer.forget(record.idempotency_key)
    return round(record.in_progress_expiry_timestamp / 1000 - layer.clock(), 1)


async def test_a_registered_lambda_context_sets_the_lease_of_its_task_alone() -> None:
    layer, config = MemoryPersistenceLayer(clock=lambda: 1e9), IdempotencyConfig()

    async def invocation(*, by_config: bool) -> float:
        if by_config:
            config.register_lambda_context(LambdaContext())
        else:
            register_lambda_context(LambdaContext())
        await asyncio.sleep(0)
        return await leases_of(config, layer)

    assert await asyncio.create_task(invocation(by_config=True)) == 10
    assert await asyncio.create_task(invocation(by_config=False)) == 10
    assert await leases_of(config, layer) == 30


def test_a_registered_context_is_not_seen_by_other_threads() -> None:
    config = IdempotencyConfig()
    token = register_lambda_context(context := LambdaContext())
    try:
        assert current_lambda_context(config) is context
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(current_lambda_context, config).result() is None
    finally:
        reset_lambda_context(token)
    assert current_lambda_context(config) is None


async def test_the_context_of_a_config_is_used_unless_one_is_registered() -> None:
    class Countable(LambdaContext):
        def __len__(self) -> int:
            return 0

    config = IdempotencyConfig(lambda_context=SimpleNamespace(get_remaining_time_in_millis=lambda: 7_000))
    layer = MemoryPersistenceLayer(clock=lambda: 1e9)
    assert await leases_of(config, layer) == 7
    token = register_lambda_context(Countable())
    assert await leases_of(config, layer) == 10
    reset_lambda_context(token)
    assert await leases_of(config, layer) == 7


def test_a_context_can_be_forgotten() -> None:
    config = IdempotencyConfig()
    token = register_lambda_context(LambdaContext())
    register_lambda_context(None)
    assert current_lambda_context(config) is None
    reset_lambda_context(token)


def test_what_is_no_lambda_context_is_refused_when_it_is_registered() -> None:
    wrong: Any = object()
    for register in (register_lambda_context, IdempotencyConfig().register_lambda_context):
        with pytest.raises(IdempotencyConfigError, match="get_remaining_time_in_millis"):
            register(wrong)
