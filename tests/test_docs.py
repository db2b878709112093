"""The documentation speaks of everything there is, and of nothing else; its examples are run by Sybil."""

from __future__ import annotations

import ast
import dataclasses
import importlib.metadata
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import aidem
from aidem import IdempotencyConfig
from aidem._distribution import DISTRIBUTION, how_to_install
from aidem._http import answers
from aidem.asgi import Problem
from aidem.hooks import EventKind

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
MODULES_WITH_PUBLIC_NAMES = (
    "aidem",
    "aidem.asgi",
    "aidem.awslambda",
    "aidem.opentelemetry",
    "aidem.persistence",
    "aidem.persistence.dynamodb",
    "aidem.persistence.postgres",
    "aidem.persistence.redis",
    "aidem.persistence.sqlite",
    "aidem.prometheus",
    "aidem.serialization",
    "aidem.sync",
    "aidem.testing",
)


def page(name: str) -> str:
    return (DOCS / name).read_text(encoding="utf-8")


def lines_of_code(path: Path) -> Iterator[str]:
    """Yield the lines of a page's blocks of code."""
    is_code = False
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.lstrip().startswith("```"):
            is_code = not is_code
        elif is_code:
            yield line


def pages_in(navigation: Any) -> Iterator[str]:
    """Yield the pages of a navigation, however deep its sections are."""
    if isinstance(navigation, str):
        yield navigation
    else:
        for entry in navigation.values() if isinstance(navigation, dict) else navigation:
            yield from pages_in(entry)


def test_every_page_is_in_the_navigation() -> None:
    config = tomllib.loads((ROOT / "zensical.toml").read_text(encoding="utf-8"))
    pages = sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md"))
    assert sorted(pages_in(config["project"]["nav"])) == pages


def test_the_first_page_leads_to_every_other() -> None:
    pages = {path.name for path in DOCS.glob("*.md")} - {"index.md"} | {"reference/index.md"}
    assert pages == set(re.findall(r"\]\(([\w/-]+\.md)\)", page("index.md")))


@pytest.mark.parametrize(
    "name", ["persistence.md", "redis.md", "dynamodb.md", "postgres.md", "http.md", "guarantees.md", "tutorial.md"]
)
def test_the_runbook_is_found_from_every_page_of_a_layer_and_every_page_of_errors(name: str) -> None:
    assert re.search(r"\]\(operations\.md[)#]", page(name))


def test_the_first_page_has_the_words_that_an_operator_looks_for() -> None:
    assert {"runbook", "rename", "gdpr"} <= set(re.findall(r"\w+", page("index.md").lower()))


def test_every_link_to_a_section_of_a_page_leads_to_one() -> None:
    def anchors(text: str) -> set[str]:
        titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
        return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}

    for target in ("operations.md", "personal-data.md"):
        known = anchors(page(target))
        for path in DOCS.glob("*.md"):
            pattern = rf"\]\({target}#([\w-]+)\)" + (r"|\]\(#([\w-]+)\)" if path.name == target else "")
            for found in re.findall(pattern, path.read_text(encoding="utf-8")):
                name = found if isinstance(found, str) else "".join(found)
                assert name in known, (path.name, name)


@pytest.mark.parametrize("front", [ROOT / "README.md", DOCS / "index.md"], ids=lambda path: path.name)
def test_every_extra_is_named_where_a_user_begins(front: Path) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    assert {f"`{extra}`" for extra in extras} <= set(re.findall(r"`\w+`", front.read_text(encoding="utf-8")))


def test_nothing_sends_anyone_to_the_project_of_somebody_else_that_has_our_import_name_on_the_index() -> None:
    files = [ROOT / name for name in ("README.md", "CHANGELOG.md", "pyproject.toml", "noxfile.py")]
    files += [*DOCS.rglob("*.md"), *DOCS.rglob("*.py"), *(ROOT / "aidem").rglob("*.py")]
    foreign = re.compile(
        r"(?:pip install|uv add|poetry add)\b[^\n]*?[\s'\"]aidem(?![\w.-])"  # a command
        r"|(?<![\w-])aidem(?:\[[a-z]|\s*[=~<>]=)"  # a requirement
        r"|pypi\.org/project/aidem(?![\w-])"
    )
    assert foreign.search("$ pip install --upgrade 'aidem[redis]'")
    assert {path.name: found[0] for path in files if (found := foreign.search(path.read_text(encoding="utf-8")))} == {}


def test_the_name_and_the_version_are_those_of_the_distribution() -> None:
    distribution = importlib.metadata.distribution(DISTRIBUTION)
    assert distribution.version == aidem.__version__
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["name"] == DISTRIBUTION
    extras = project["optional-dependencies"]
    [everything] = extras["all"]
    assert everything == f"{DISTRIBUTION}[{','.join(extra for extra in extras if extra not in {'all', 'aiobotocore'})}]"


def test_no_module_asks_which_version_of_an_installed_distribution_is_there() -> None:
    """That of our import name is somebody else's, and is not there as a rule."""
    asking = {path.name for path in (ROOT / "aidem").rglob("*.py") if "importlib.metadata" in path.read_text("utf-8")}
    assert asking == set()


def test_the_page_on_the_index_has_no_links_to_files_that_it_does_not_have() -> None:
    text = importlib.metadata.distribution(DISTRIBUTION).read_text("METADATA")
    assert text is not None
    assert "# aidem" in text
    assert re.findall(r"\]\((?!https?://)", text) == []


@pytest.mark.parametrize("extra", ["redis", "otel"])
def test_how_an_extra_is_installed_is_said_in_one_sentence_that_does_not_go_to_the_index(extra: str) -> None:
    sentence = how_to_install(extra)
    assert f"{DISTRIBUTION}[{extra}]" in sentence
    assert re.findall(r"pip install .*", sentence) == [f"pip install '/path/to/it[{extra}]'"]


def test_every_test_that_the_docs_name_exists() -> None:
    named = {
        (file, test)
        for path in DOCS.glob("*.md")
        for file, test in re.findall(r"`([\w/]+\.py)::(test_\w+)`", path.read_text(encoding="utf-8"))
    }
    assert named
    missing = {(file, test) for file, test in named if f"def {test}(" not in (ROOT / file).read_text(encoding="utf-8")}
    assert not missing


def test_every_promise_and_every_window_names_its_tests() -> None:
    sections = re.split(r"^(?:### |\*\*)(?=[PW]\d+\. )", page("guarantees.md"), flags=re.MULTILINE)[1:]
    assert [section.split(".")[0] for section in sections] == [
        *(f"P{number}" for number in range(1, 6)),
        *(f"W{number}" for number in range(1, 15)),
    ]
    assert all(".py::test_" in section for section in sections)


@pytest.mark.parametrize(
    ("name", "section"),
    [
        ("blocking.md", "In a worker of a task queue"),
        ("lambda.md", "Batches"),
        ("observing.md", "Prometheus"),
        ("observing.md", "OpenTelemetry"),
        ("observing.md", "CloudWatch with Powertools Metrics"),
        ("operations.md", "A check instead of a human"),
        ("operations.md", "From code"),
    ],
)
def test_an_example_that_readers_come_to_by_a_link_runs_without_the_blocks_before_it(name: str, section: str) -> None:
    [text] = re.findall(rf"^## {section}$(.*?)(?:^## |\Z)", page(name), re.MULTILINE | re.DOTALL)
    example = re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)[0]
    exec(compile(example, name, "exec", dont_inherit=True), {"__name__": "example"})


def test_every_window_says_what_happens_what_aidem_does_and_what_the_user_can_do() -> None:
    windows = re.split(r"^### W", page("guarantees.md"), flags=re.MULTILINE)[1:]
    for window in windows:
        for part in ("What happens.", "What aidem does.", "What you can do."):
            assert f"**{part}**" in window, window.splitlines()[0]


def test_no_line_of_code_is_wider_than_the_column_of_text() -> None:
    """Wider lines are cut in a browser, and can be read only by scrolling to the side."""
    wide = {f"{path.name}: {line}" for path in DOCS.rglob("*.md") for line in lines_of_code(path) if len(line) > 88}
    assert wide == set()


@pytest.mark.parametrize("setting", dataclasses.fields(IdempotencyConfig), ids=lambda setting: setting.name)
def test_every_setting_is_described_with_its_default(setting: dataclasses.Field[Any]) -> None:
    sections = {
        name: text for name, _, text in (part.partition("`\n") for part in page("configuration.md").split("### `"))
    }
    described = re.search(r"\bDefault:\s`([^`]*)`", sections[setting.name])
    assert described is not None
    assert ast.literal_eval(described.group(1)) == setting.default


def test_no_setting_is_described_that_does_not_exist() -> None:
    described = re.findall(r"^### `(\w+)`$", page("configuration.md"), re.MULTILINE)
    assert sorted(described) == sorted(setting.name for setting in dataclasses.fields(IdempotencyConfig))


def test_every_kind_of_event_is_described() -> None:
    [events] = re.findall(r"^## Events$(.*?)^## ", page("observing.md"), re.MULTILINE | re.DOTALL)
    assert sorted(re.findall(r"^\| `(\w+)` \|", events, re.MULTILINE)) == sorted(EventKind)


def test_every_answer_of_the_http_layer_is_described() -> None:
    row = r"^\| (\d+)( with `Retry-After`)? \| .* \| `([\w-]+)` \| (?:no|yes) \|$"
    rows = re.findall(row, page("http.md"), re.MULTILINE)
    problems = [value for value in vars(answers).values() if isinstance(value, Problem)]
    described = {(int(status), bool(retry_after), name) for status, retry_after, name in rows}
    assert described == {(answer.status, answer.retry_after_seconds is not None, answer.name) for answer in problems}


@pytest.mark.parametrize("module", MODULES_WITH_PUBLIC_NAMES)
def test_every_public_name_is_in_the_reference(module: str) -> None:
    shown = re.findall(r"^::: ([\w.]+)$", page(f"reference/{module}.md"), re.MULTILINE)
    names: list[str] = importlib.import_module(module).__all__
    assert {f"{module}.{name}" for name in names} <= set(shown)


def test_the_reference_leads_to_the_page_of_every_module() -> None:
    pages = {path.name for path in (DOCS / "reference").glob("aidem*.md")}
    assert pages == set(re.findall(r"\]\(([\w.]+\.md)\)", page("reference/index.md")))
    assert {f"{module}.md" for module in MODULES_WITH_PUBLIC_NAMES} <= pages
