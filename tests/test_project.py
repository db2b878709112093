"""The files around the code name the sessions and the versions that there are."""

from __future__ import annotations

import ast
import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]


def text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def sessions() -> set[str]:
    functions = [node for node in ast.parse(text("noxfile.py")).body if isinstance(node, ast.FunctionDef)]
    return {function.name for function in functions if function.decorator_list}


def test_every_session_that_is_named_exists() -> None:
    workflow = text(".github/workflows/ci.yml")
    [listed] = re.findall(r"^ +session: \[(.*)\]$", workflow, re.MULTILINE)
    in_table = re.findall(r"^\| (`.*?`) \|", text("CONTRIBUTING.md"), re.MULTILINE)
    named = {*listed.split(", "), *re.findall(r"\{session: (\w+)", workflow)}
    named |= {session.strip("`") for row in in_table for session in row.split(", ")}
    assert named >= {"quick", "lint", "tests", "bench"}
    workflow += text(".github/workflows/release.yml")
    pages = workflow + text("CONTRIBUTING.md") + text("README.md") + text("CHANGELOG.md")
    named |= set(re.findall(r"nox -s (\w+)", pages))
    assert named - sessions() == set()


def test_every_test_that_a_session_picks_exists() -> None:
    picked = set(re.findall(r'"(tests/[\w/.]+)(?:::(\w+))?"', text("noxfile.py") + text("conftest.py")))
    assert {("tests/stateful", ""), ("tests/sync/test_interrupts.py", "")} <= picked
    assert {path for path, _ in picked if not (ROOT / path).exists()} == set()
    assert {test for path, test in picked if test and not re.search(rf"(def|class) {test}\(", text(path))} == set()


def test_the_hooks_before_a_commit_install_what_the_session_installs() -> None:
    hooks = re.findall(r'additional_dependencies: \["(.+)"\]', text(".pre-commit-config.yaml"))
    groups = tomllib.loads(text("pyproject.toml"))["dependency-groups"]
    assert set(hooks) == set(groups["lint"])


def test_every_file_that_is_linked_from_outside_the_docs_exists() -> None:
    pages = ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")
    linked = {link for page in pages for link in re.findall(r"\]\((?!https?:)([^)#]+)", text(page))}
    assert "docs/internals.md" in linked
    assert {link for link in linked if not (ROOT / link).exists()} == set()
