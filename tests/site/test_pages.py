"""Every page in a real browser, wide and narrow, on a light and a dark system: nothing is cut, all can be read."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any, TypeAlias

import pytest
from selenium.webdriver import Chrome

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md"))
WIDTHS = (1400, 390)
SMALLEST_TEXT = 10  # CSS pixels

Looked: TypeAlias = dict[str, Any]

# Blocks whose content is wider than they are, and what reaches beyond the window; a pixel is rounding.
LOOK = """
const content = document.querySelector('.md-content');
for (const folded of content.querySelectorAll('details')) folded.open = true;
const holds = (element) => element.textContent.trim() !== '' || element.matches('img');
const shown = [...content.querySelectorAll('*')].filter((element) => element.offsetParent !== null && holds(element));
const blocks = shown.filter((element) => element.matches('pre, pre > code, table, .md-typeset__scrollwrap'));
const named = (element) => element.tagName.toLowerCase() + ': ' + element.textContent.trim().slice(0, 60);
const right = (element) => element.getBoundingClientRect().right;
return {
  width: innerWidth,
  page: document.documentElement.scrollWidth,
  elsewhere: performance.getEntriesByType('resource').map(({name}) => name).filter((name) => !name.startsWith(origin)),
  cut: blocks.filter((block) => block.scrollWidth > block.clientWidth + 1).map(named),
  outside: shown.filter((element) => right(element) > document.documentElement.clientWidth + 1).map(named),
  images: shown.filter((element) => element.matches('img')).map((image) => ({
    source: decodeURI(image.src), natural: image.naturalWidth, shown: image.getBoundingClientRect().width,
  })),
};
"""


def url_of(page: str) -> str:
    name = page.removesuffix(".md")
    return "/" if name == "index" else f"/{name.removesuffix('/index')}/"


def resize(browser: Chrome, width: int) -> None:
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)


def smallest_text(drawing: Path, *, width: float) -> float:
    """Return the size of the smallest text of a drawing that is shown so wide."""
    text = drawing.read_text("utf-8")
    [natural] = [float(size) for size in re.findall(r'viewBox="[-\d.]+ [-\d.]+ ([\d.]+)', text)[:1]]
    return min(float(size) for size in re.findall(r"font(?:-size)?: ?(?:\w+ )*?([\d.]+)px", text)) * width / natural


def luminance(color: str) -> float:
    parts = [float(part) / 255 for part in re.findall(r"[\d.]+", color)[:3]]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@pytest.mark.parametrize("page", PAGES)
def test_nothing_is_cut_and_all_can_be_read(page: str, browser: Chrome, site_url: str) -> None:
    browser.get(site_url + url_of(page))
    for width in WIDTHS:
        resize(browser, width)
        looked: Looked = browser.execute_script(LOOK)
        assert looked["width"] == width
        assert looked["page"] <= width, "the page scrolls to the side"
        assert looked["elsewhere"] == [], "the page needs other hosts"
        assert looked["cut"] == [], f"at {width} pixels"
        assert looked["outside"] == [], f"at {width} pixels"
        for image in looked["images"]:
            assert image["natural"] > 0, f"{image['source']} is not there"
            drawing = DOCS / image["source"].split("/", 3)[3]
            assert smallest_text(drawing, width=image["shown"]) >= SMALLEST_TEXT, image


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_page_is_as_light_or_dark_as_the_system_and_its_text_stands_out(
    scheme: str, browser: Chrome, site_url: str
) -> None:
    preference = {"name": "prefers-color-scheme", "value": scheme}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [preference]})
    browser.get(f"{site_url}/how-it-works/")
    colors = "const style = getComputedStyle(document.body); return [style.color, style.backgroundColor];"
    text, ground = (luminance(color) for color in browser.execute_script(colors))
    assert ground > 0.9 if scheme == "light" else ground < 0.1
    assert (max(text, ground) + 0.05) / (min(text, ground) + 0.05) >= 7


@pytest.mark.parametrize("drawing", sorted((DOCS / "diagrams").glob("*.svg")), ids=lambda path: path.stem)
def test_a_diagram_has_colors_for_dark_systems(drawing: Path) -> None:
    assert "prefers-color-scheme:dark" in drawing.read_text("utf-8").replace(" ", "")


def test_every_diagram_is_drawn_from_its_text() -> None:
    ran = subprocess.run(
        [sys.executable, DOCS / "diagrams" / "draw.py", "--check"], capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
