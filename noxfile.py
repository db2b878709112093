"""Development tasks: `nox` runs every check, `nox -l` lists the sessions."""

from __future__ import annotations

import os
import platform
import secrets
import shutil
import subprocess
import sys
from pathlib import Path

import nox

nox.needs_version = ">=2025.5.1"
nox.options.default_venv_backend = "uv|virtualenv"
nox.options.download_python = "never"
nox.options.reuse_existing_virtualenvs = True
nox.options.sessions = ["lint", "demo", "package", "typing", "servers", "docs", "tests", "aiobotocore", "lowest"]

SUPPORTED = ("3.11", "3.12", "3.13")
NEXT = "3.14"  # tested wherever it is present
MAIN = f"{sys.version_info.major}.{sys.version_info.minor}"

# What depends on the version of a client; a second server, Powertools and many processes do not.
DYNAMODB_CLIENT = [f"tests/persistence/dynamodb/test_{part}.py" for part in ("dynamodb", "client")]
DYNAMODB_FAULTS = [f"tests/persistence/dynamodb/test_{part}.py" for part in ("errors", "faults")]
REDIS_CLIENT = [
    f"tests/persistence/redis/test_{part}.py" for part in ("redis", "conformance", "connection", "errors", "handshake")
]
PYDANTIC = ["tests/rules/test_payloads.py", "tests/rules/test_model_dump.py", "tests/serialization"]
HTTP = [f"tests/http/test_{part}.py" for part in ("fastapi_functions", "fastapi_openapi", "fastapi_route")]
POSTGRES_CLIENT = [f"tests/persistence/postgres/test_{part}.py" for part in ("postgres", "connections", "errors")]
POSTGRES_POOLS = [f"tests/persistence/postgres/test_{part}.py" for part in ("pools", "conformance")]
OBSERVERS = ["tests/test_opentelemetry.py", "tests/test_prometheus.py"]
ONE_SERVER = ["-k", "not moto and not valkey"]
# What is tested on the main interpreter alone, as it is the same on every other, beside the documents: measurements,
# the model of a layer, comparisons with Powertools, what other programs make of the same HTTP answers, layers and
# engines that are broken on purpose, and processes that are killed.
SAME_EVERYWHERE = [
    "tests/differential",
    "tests/http/test_attacks.py",
    "tests/http/test_examples.py",
    "tests/http/test_generated_client.py",
    "tests/http/test_schemathesis.py",
    "tests/http/test_uvicorn_fits.py",
    "tests/migration",
    "tests/persistence/sqlite/test_torture.py",
    "tests/processes",
    "tests/recipes",
    "tests/simulation/test_simulation.py::test_a_broken_promise_is_noticed",
    "tests/simulation/test_simulation.py::test_no_rule_is_broken_in_many_more_runs",
    "tests/site",
    "tests/stateful",
    "tests/test_benchmarks.py",
    "tests/test_docs.py",
    "tests/testing/test_conformance_catches_broken_layers.py",
    "tests/testing/test_conformance_catches_broken_transactions.py",
    "tests/testing/test_crash_databases.py",
    "tests/testing/test_documented_handlers.py",  # on 3.13 aiosqlite leaves a connection open when it is cancelled
    "tests/testing/test_scan_conformance_catches_broken_layers.py",
    "tests/testing/test_take_over_conformance_catches_broken_layers.py",
]
# What makes up most of the time of the tests without servers: processes, and faults planned in great number.
SLOW = [
    "tests/awslambda/test_interrupts.py",
    "tests/awslambda/test_processes.py",
    "tests/persistence/sqlite/test_processes.py",
    "tests/runtime/test_cancellation.py",
    "tests/runtime/test_forks.py",
    "tests/simulation",
    "tests/sync/test_greenlets.py",
    "tests/sync/test_interrupts.py",
    "tests/sync/test_processes.py",
    "tests/testing/test_crash_everywhere.py",
    "tests/testing/test_testing.py",
]
# Debian's packages of what is tested against, and a file of each, or one of several; the browser is for the docs.
SERVERS = {
    "chromium": "chromium|google-chrome",
    "chromium-driver": "chromedriver",
    "faketime": f"/usr/lib/{platform.machine()}-linux-gnu/faketime/libfaketime.so.1",
    "garagemq": "garagemq",
    "openssl": "openssl",
    "pgbouncer": "pgbouncer",
    "postgresql": "/usr/lib/postgresql/*/bin/initdb",
    "redis-sentinel": "redis-sentinel",
    "redis-server": "redis-server",
}


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
# Tests start hundreds of interpreters, and each of them would compile everything that it imports.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
_reveal_pyenv_versions()
PROJECT = nox.project.load_toml("pyproject.toml")
PRESENT = [version for version in sorted({*SUPPORTED, NEXT, MAIN}) if _is_present(version)]


def _install(session: nox.Session, *groups: str) -> None:
    session.install("-e", ".[all]", *nox.project.dependency_groups(PROJECT, *groups))


def _side_by_side(session: nox.Session, *arguments: str) -> list[str]:
    """Return a command of pytest that shares out files between processes, longest files first.

    There are three processes for two cores, as a third of the time they wait: for servers, leases and other processes.
    """
    # Names of test cases hold sets, so all processes need one seed; it is printed, for who wants to set it again.
    seed = os.environ.get("PYTHONHASHSEED", str(secrets.randbelow(2**32)))
    session.log(f"PYTHONHASHSEED={seed}")
    session.env["PYTHONHASHSEED"] = seed
    processes = 3 * len(os.sched_getaffinity(0)) // 2 if hasattr(os, "sched_getaffinity") else "auto"
    side_by_side = ["-n", str(processes), "--maxprocesses", "8", "--dist", "loadfile", "--no-loadscope-reorder"]
    return ["pytest", *side_by_side, *arguments, *session.posargs]


def _without(session: nox.Session, tests: list[str]) -> list[str]:
    """Return arguments that leave out these tests, those with servers, and the examples of the documents."""
    left_out = (f"--deselect={test}" if "::" in test else f"--ignore={test}" for test in tests)
    return ["-m", "not server", *left_out, *([] if session.posargs else ["tests"])]


@nox.session
def lint(session: nox.Session) -> None:
    """Check style, format and the direction of imports."""
    session.install(*nox.project.dependency_groups(PROJECT, "lint"))
    session.run("ruff", "check")
    session.run("ruff", "format", "--check")
    session.run("lint-imports", "--no-logo", "--no-cache")


@nox.session
def typing(session: nox.Session) -> None:
    """Check types with mypy and pyright, both strict, at the same time."""
    _install(session, "test", "recipes", "typing")
    with subprocess.Popen([str(Path(session.bin, "mypy"))]) as mypy:
        session.run("pyright")
    if mypy.returncode:
        session.error("mypy has found errors")


@nox.session
def demo(session: nox.Session) -> None:
    """Show a payment handler that is called twice and charges once."""
    session.install(".")
    session.run("python", "docs/examples/payment.py")


@nox.session
def package(session: nox.Session) -> None:
    """Build what would be published, check its page for the index, and run the demo on the wheel alone."""
    session.install(*nox.project.dependency_groups(PROJECT, "package"))
    built = Path("dist")
    shutil.rmtree(built, ignore_errors=True)
    session.run("uv", "build", "--quiet", "--out-dir", str(built))
    session.run("twine", "check", "--strict", *map(str, built.glob("aidem*")))
    elsewhere = Path(session.create_tmp()) / "wheel"  # beside it there is no checkout to import from
    shutil.rmtree(elsewhere, ignore_errors=True)
    for wheel in built.glob("*.whl"):
        session.run("uv", "venv", "--quiet", str(elsewhere))
        session.run("uv", "pip", "install", "--quiet", "--python", str(elsewhere), str(wheel))
    demo = shutil.copy("docs/examples/payment.py", elsewhere)
    session.run("uv", "run", "--quiet", "--no-project", "--python", str(elsewhere), demo)


@nox.session
def docs(session: nox.Session) -> None:
    """Build the documentation into `site`, where a broken link is an error, and look at every page in a browser."""
    _install(session, "docs")
    session.run("zensical", "build", "--clean", "--strict")
    session.run("pytest", "tests/site", *session.posargs)


@nox.session
def diagrams(session: nox.Session) -> None:
    """Draw the diagrams of the documentation from their text."""
    session.install(*nox.project.dependency_groups(PROJECT, "docs"))
    session.run("python", "docs/diagrams/draw.py")


@nox.session
def quick(session: nox.Session) -> None:
    """Run in a minute what needs no server and takes no time: for while you work."""
    _install(session, "test")
    session.run(*_side_by_side(session, *_without(session, [*SAME_EVERYWHERE, *SLOW])))


def _is_installed(file: str) -> bool:
    """Whether a program is there, or one of several, or a file; in its path a star stands for any name."""
    if file.startswith("/"):
        return any(Path("/").glob(file.lstrip("/")))
    return any(shutil.which(program) is not None for program in file.split("|"))


@nox.session
def servers(session: nox.Session) -> None:
    """Install the servers of the tests, by apt-get, as root, and what needs an environment of its own.

    Into that of this session comes what wants other versions of clients than ours: ministack, and arq, whose workers
    need aidem beside them.
    """
    session.install("ministack>=1.5", "arq>=0.28", "-e", ".[redis]")
    missing = [package for package, file in SERVERS.items() if not _is_installed(file)]
    if not missing:
        return
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        session.error(f"The tests need what Debian has in these packages; install them: {' '.join(missing)}")
    # The package starts a server of its own, unless init scripts are forbidden to: 101 is how this is said.
    policy = Path("/usr/sbin/policy-rc.d")
    is_ours = not policy.exists()
    if is_ours:
        policy.write_text("#!/bin/sh\nexit 101\n")
        policy.chmod(0o755)
    try:
        session.run("apt-get", "update", "-q", external=True)
        noninteractive = {"DEBIAN_FRONTEND": "noninteractive"}
        session.run("apt-get", "install", "-qy", "--no-install-recommends", *missing, env=noninteractive, external=True)
    finally:
        if is_ours:
            policy.unlink()


@nox.session(python=PRESENT)
def tests(session: nox.Session) -> None:
    """Run the suite: on the main interpreter all of it, with coverage; on the others what may differ there."""
    _install(session, "test", *(["recipes"] if session.python == MAIN else []))
    if session.python != MAIN:
        session.run(*_side_by_side(session, *_without(session, SAME_EVERYWHERE)))
        return
    for version in sorted({*SUPPORTED} - {*PRESENT}):
        session.warn(f"Python {version} is not on this machine: the suite does not run on it.")
    session.run("coverage", "erase")
    session.run("coverage", "run", "-m", *_side_by_side(session, "--ignore=tests/site"))  # that is for `docs`
    session.run("coverage", "combine", "--quiet")
    if not session.posargs:
        session.run("coverage", "report")


@nox.session
def aiobotocore(session: nox.Session) -> None:
    """Run the DynamoDB suite on the newest aiobotocore, without aioboto3, which pins an old one."""
    session.install("-e", ".[aiobotocore]", *nox.project.dependency_groups(PROJECT, "test"))
    session.run(*_side_by_side(session, *ONE_SERVER, *DYNAMODB_CLIENT, *DYNAMODB_FAULTS))


@nox.session
def lowest(session: nox.Session) -> None:
    """Run what speaks to other packages on the lowest versions of them that are supported."""
    project = PROJECT["project"]
    session.install("-e", ".", *_floors(project["dependencies"]))
    session.run("python", "docs/examples/payment.py")  # pytest's plugin is anyio's, and takes a newer one
    extras = [needed for extra in project["optional-dependencies"].values() for needed in extra]
    session.install("-e", ".[all]", *_floors(extras), *nox.project.dependency_groups(PROJECT, "test"))
    files = [*DYNAMODB_CLIENT, *REDIS_CLIENT, *POSTGRES_CLIENT, *POSTGRES_POOLS, *PYDANTIC, *HTTP, *OBSERVERS]
    session.run(*_side_by_side(session, *ONE_SERVER, *files))


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
def audit(session: nox.Session) -> None:
    """Look for known vulnerabilities in what the extras bring, newest and lowest; the advisories come from PyPI.

    It fails where they cannot be had, as behind a mirror that has packages only.
    """
    session.install(*nox.project.dependency_groups(PROJECT, "audit"))
    extras = [needed for extra in PROJECT["project"]["optional-dependencies"].values() for needed in extra]
    requirements = [needed for needed in [*PROJECT["project"]["dependencies"], *extras] if ">=" in needed]
    for name, lines in (("newest", requirements), ("lowest", _floors(requirements))):
        listed = Path(session.create_tmp(), f"{name}.txt")
        listed.write_text("\n".join(lines) + "\n")
        session.run("pip-audit", "--strict", "--requirement", str(listed))


@nox.session
def bench(session: nox.Session) -> None:
    """Measure against other libraries and print one table of ratios; see docs/benchmarks.md."""
    _install(session, "bench")
    session.run("python", "-m", "benchmarks", *session.posargs)
