"""The checkout of docs/examples, as a person uses it: "Pay" twice, the worker killed in the middle, one charge."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from selenium.webdriver import Chrome
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

from tests.support.checkout import checkout

PATIENCE_SECONDS = 40
WIDTHS = (1400, 390)


@pytest.fixture
def page(browser: Chrome, tmp_path: Path) -> Iterator[Chrome]:
    with checkout(tmp_path) as url:
        browser.get(url)
        yield browser
        browser.get("about:blank")


def text_of(page: Chrome, name: str) -> str:
    return page.find_element(By.ID, name).text


def click(page: Chrome, name: str) -> None:
    page.find_element(By.ID, name).click()


def wait_for(page: Chrome, name: str, pattern: str) -> None:
    WebDriverWait(page, PATIENCE_SECONDS).until(lambda page: re.search(pattern, text_of(page, name), re.DOTALL))


def test_two_clicks_and_a_killed_worker_make_one_charge(page: Chrome) -> None:
    click(page, "kill")
    wait_for(page, "log", "No payment is being made")
    click(page, "pay")
    wait_for(page, "records", "running, fence .* worker [0-9]+")
    click(page, "pay")
    click(page, "kill")
    wait_for(page, "log", "no answer; trying again")
    wait_for(page, "log", "click 1: 201")
    wait_for(page, "log", "click 2: 201")
    wait_for(page, "records", "completed")
    assert re.fullmatch("1 charge for O-[0-9]+", text_of(page, "total"))
    assert len(text_of(page, "charges").splitlines()) == 1

    click(page, "new")
    wait_for(page, "total", "^0 charges for")
    for width in WIDTHS:
        page.set_window_size(width, 900)
        assert page.execute_script("return document.documentElement.scrollWidth <= innerWidth")
