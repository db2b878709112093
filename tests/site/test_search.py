"""What a reader types into the search of the site, and where it leads."""

from __future__ import annotations

import pytest
from selenium.webdriver import ActionChains, Chrome, Keys
from selenium.webdriver.support.ui import WebDriverWait

# The dialog of the search has a shadow root.
FOUND = """
const links = (root) => [...root.querySelectorAll('*')].flatMap((element) => [
  ...(element.matches('a[href]') ? [element] : []),
  ...(element.shadowRoot ? links(element.shadowRoot) : []),
]);
return links(document).filter((link) => link.getRootNode() !== document).map((link) => link.getAttribute('href'));
"""


@pytest.mark.parametrize(
    ("words", "page"),
    [
        ("prometheus", "/observing/#prometheus"),
        ("postgres", "/postgres/"),
        ("rename", "/changing-keys/"),
        ("sqs partial batch", "/lambda/#batches"),
        ("gdpr", "/personal-data/"),
        ("kubernetes", "/kubernetes/"),
        ("global tables", "/production/#several-regions-global-tables"),
    ],
)
def test_the_search_finds_a_page_by_the_word_that_a_reader_has_for_it(
    words: str, page: str, browser: Chrome, site_url: str
) -> None:
    browser.get(f"{site_url}/")
    ActionChains(browser).key_down(Keys.CONTROL).send_keys("k").key_up(Keys.CONTROL).perform()
    WebDriverWait(browser, 10).until(lambda browser: browser.execute_script(FOUND) is not None)
    ActionChains(browser).send_keys(words).perform()
    found = WebDriverWait(browser, 10).until(lambda browser: browser.execute_script(FOUND))
    assert site_url + page in found[:10]
