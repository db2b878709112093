"""The built site, served on this machine, and one browser for all its pages."""

from __future__ import annotations

import functools
import http.server
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from selenium.webdriver import Chrome, ChromeOptions, ChromeService

ROOT = Path(__file__).parents[2]
SITE = ROOT / "site"
BROWSERS = ("chromium", "google-chrome")


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture(scope="session")
def site_url() -> Iterator[str]:
    """Serve the site that `nox -s docs` has built of the pages as they are."""
    built = SITE / "index.html"
    sources = [path for path in [ROOT / "zensical.toml", *(ROOT / "docs").rglob("*")] if path.suffix in {".md", ".css"}]
    assert built.exists(), "`nox -s docs` builds the site"
    assert built.stat().st_mtime >= max(path.stat().st_mtime for path in sources), "`nox -s docs` builds the site anew"
    handler = functools.partial(Quiet, directory=SITE)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.fixture(scope="session")
def browser() -> Iterator[Chrome]:
    """Start Chromium without a window; `nox -s servers` installs it and its driver."""
    found = [path for name in BROWSERS if (path := shutil.which(name)) is not None]
    driver = shutil.which("chromedriver")
    assert found, f"none of {', '.join(BROWSERS)} is installed; `nox -s servers` installs one"
    assert driver is not None, "chromedriver is not installed; `nox -s servers` installs it"
    options = ChromeOptions()
    options.binary_location = found[0]
    options.add_argument("--headless=new")
    if os.geteuid() == 0:
        options.add_argument("--no-sandbox")
    started = Chrome(options, ChromeService(driver))
    yield started
    started.quit()
