"""Development tasks: `nox` runs every check, `nox -l` lists the sessions."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import nox

nox.needs_version = ">=2025.5.1"
nox.options.default_venv_backend = "uv|virtualenv"
nox.options.download_python = "never"
nox.options.reuse_existing_virtualenvs = True
nox.options.sessions = ["lint", "demo", "package", "docs", "typing", "tests", "aiobotocore", "lowest"]

SUPPORTED = ("3.11", "3.12", "3.13")
MAIN = f"{sys.version_info.major}.{sys.version_info.minor}"

# What depends on the version of a client; a second server, Powertools and many processes do not.
DYNAMODB_CLIENT = [f"tests/persistence/dynamodb/test_{part}.py" for part in ("dynamodb", "client")]
DYNAMODB_FAULTS = [f"tests/persistence/dynamodb/test_{part}.py" for part in ("errors", "faults")]
REDIS_CLIENT = [f"tests/persistence/redis/test_{part}.py" for part in ("redis", "conformance", "connection", "errors")]
PYDANTIC = ["tests/rules/test_payloads.py", "tests/rules/test_model_dump.py", "tests/serialization"]
HTTP = [
    f"tests/http/test_{part}.py" for part in ("fastapi_functions", "fastapi_openapi", "fastapi_route", "schemathesis")
]
OPENTELEMETRY = ["tests/test_opentelemetry.py"]
ONE_SERVER = ["-k", "not moto and not valkey"]


def _reveal_pyenv_versions() -> None:
    """Let pyenv's shims start every version it has, not only the one selected here."""
    pyenv = shutil.which("pyenv")
    if pyenv is None or "PYENV_VERSION" in os.environ:
        return
    versions = subprocess.run([pyenv, "versions", "--bare", "--skip-aliases"], capture_output=True, text=True).stdout
    main_first = sorted(versions.split(), key=lambda version: not version.startswith(f"{MAIN}."))
    os.environ["PYENV_VERSION"] = ":".join(main_first)


def _is_present(version: str) -> bool:
    command = [f"python{version}", "-c", ""]
    return version == MAIN or (
        shutil.which(command[0]) is not None and subprocess.run(command, capture_output=True).returncode == 0
    )


os.environ.setdefault("UV_SYSTEM_CERTS", "1")  # uv then trusts what pip trusts
_reveal_pyenv_versions()
PROJECT = nox.project.load_toml("pyproject.toml")
PRESENT = [version for version in sorted({*SUPPORTED, MAIN}) if _is_present(version)]


def _install(session: nox.Session, *groups: str) -> None:
    session.install("-e", ".[all]", *nox.project.dependency_groups(PROJECT, *groups))


@nox.session
def lint(session: nox.Session) -> None:
    """Check style, format and the direction of imports."""
    session.install(*nox.project.dependency_groups(PROJECT, "lint"))
    session.run("ruff", "check")
    session.run("ruff", "format", "--check")
    session.run("lint-imports", "--no-logo", "--no-cache")


@nox.session
def typing(session: nox.Session) -> None:
    """Check types with mypy and pyright, both strict."""
    _install(session, "test", "typing")
    session.run("mypy")
    session.run("pyright")


@nox.session
def demo(session: nox.Session) -> None:
    """Show a payment handler that is called twice and charges once."""
    session.install(".")
    session.run("python", "docs/examples/payment.py")


@nox.session
def package(session: nox.Session) -> None:
    """Build what would be published, check its page for the index, and run the demo on the wheel alone."""
    session.install(*nox.project.dependency_groups(PROJECT, "package"))
    built = Path(session.create_tmp()) / "dist"
    shutil.rmtree(built, ignore_errors=True)
    session.run("uv", "build", "--quiet", "--out-dir", str(built))
    files = [str(path) for path in built.glob("aidem*")]
    session.run("twine", "check", "--strict", *files)
    [wheel] = built.glob("*.whl")
    session.run("uv", "venv", "--quiet", str(built / "venv"))
    session.run("uv", "pip", "install", "--quiet", "--python", str(built / "venv"), str(wheel))
    demo = shutil.copy("docs/examples/payment.py", built)  # beside it there is no checkout to import from
    session.run("uv", "run", "--quiet", "--no-project", "--python", str(built / "venv"), demo)


@nox.session
def docs(session: nox.Session) -> None:
    """Build the documentation into `site`; a broken link, or a name that does not exist, is an error."""
    session.install(*nox.project.dependency_groups(PROJECT, "docs"))
    session.run("zensical", "build", "--clean", "--strict")


@nox.session(python=PRESENT)
def tests(session: nox.Session) -> None:
    """Run the suite: on the main interpreter all of it, with coverage; on the others without servers."""
    _install(session, "test")
    if session.python != MAIN:
        session.run("pytest", "-m", "not server", *session.posargs)
        return
    for version in sorted({*SUPPORTED} - {*PRESENT}):
        session.warn(f"Python {version} is not on this machine: the suite does not run on it.")
    session.run("coverage", "erase")
    session.run("coverage", "run", "-m", "pytest", *session.posargs)
    session.run("coverage", "combine", "--quiet")
    if not session.posargs:
        session.run("coverage", "report")


@nox.session
def aiobotocore(session: nox.Session) -> None:
    """Run the DynamoDB suite on the newest aiobotocore, without aioboto3, which pins an old one."""
    session.install("-e", ".[aiobotocore]", *nox.project.dependency_groups(PROJECT, "test"))
    session.run("pytest", *ONE_SERVER, *DYNAMODB_CLIENT, *DYNAMODB_FAULTS, *session.posargs)


@nox.session
def lowest(session: nox.Session) -> None:
    """Run what speaks to other packages on the lowest versions of them that are supported."""
    project = PROJECT["project"]
    session.install("-e", ".", *_floors(project["dependencies"]))
    session.run("python", "docs/examples/payment.py")  # pytest's plugin is anyio's, and takes a newer one
    extras = [needed for extra in project["optional-dependencies"].values() for needed in extra]
    session.install("-e", ".[all]", *_floors(extras), *nox.project.dependency_groups(PROJECT, "test"))
    files = [*DYNAMODB_CLIENT, *REDIS_CLIENT, *PYDANTIC, *HTTP, *OPENTELEMETRY]
    session.run("pytest", *ONE_SERVER, *files, *session.posargs)


def _floors(requirements: list[str]) -> list[str]:
    return [needed.replace(">=", "==") for needed in requirements if ">=" in needed]


@nox.session
def mutate(session: nox.Session) -> None:
    """Change the pure core in every small way and see the suite fail."""
    _install(session, "test", "mutate")
    session.run("mutmut", "run", *session.posargs)
    if survivors := session.run("mutmut", "results", silent=True):
        session.error(f"No test fails with these changes; see one with `mutmut show NAME`.\n{survivors}")


@nox.session
def simulate(session: nox.Session) -> None:
    """Look for a seed that breaks a promise in a simulated world: `nox -s simulate -- --count 10000 --start 0`."""
    session.install("-e", ".")
    session.run("python", "-m", "tests.simulation", *session.posargs)


@nox.session
def bench(session: nox.Session) -> None:
    """Measure against other libraries and print one table of ratios; see docs/benchmarks.md."""
    _install(session, "bench")
    session.run("python", "-m", "benchmarks", *session.posargs)
