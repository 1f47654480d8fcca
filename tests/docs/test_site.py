"""The documentation site, in a real browser: light and dark, no missing picture, no error, nothing from other hosts.

scripts/docs builds the site and runs this file. It needs neither qlora_ext nor torch.
"""

from __future__ import annotations

import functools
import http.server
import os
import pathlib
import shutil
import threading
from collections.abc import Iterator
from typing import Any

import pytest

ROOT = pathlib.Path(__file__).parents[2]
SITE = ROOT / "build" / "site"
PAGES = [
    *("index.html", "installation.html", "quickstart.html", "recipes.html", "benchmarks.html", "quality.html"),
    *("api.html", "reference/qlora_ext.html", "reference/qlora_ext.nn.html", "results/amd_26_2.html"),
    *("examples/notebook.html", "examples/finetune.html", "troubleshooting.html", "changelog.html"),
]
THEMES = {"light": "default", "dark": "slate"}

if not (SITE / "index.html").exists():
    pytest.skip("the site is not built (scripts/docs builds it)", allow_module_level=True)
pytest.importorskip("playwright", reason="playwright is not installed (scripts/docs installs it)")

from playwright.sync_api import Error, Page, sync_playwright


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(_Quiet, directory=str(SITE)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    installed = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    with sync_playwright() as playwright:
        try:
            found = playwright.chromium.launch(executable_path=installed, args=["--no-sandbox"])
        except Error as error:
            reason = str(error).splitlines()[0]
            pytest.skip(f"no Chromium (apt-get install chromium, or playwright install chromium): {reason}")
        yield found
        found.close()


def opened(browser: Any, address: str, theme: str) -> tuple[Page, list[str]]:
    """A page that collects what goes wrong on it."""
    page = browser.new_context(color_scheme=theme, viewport={"width": 1280, "height": 900}).new_page()
    wrong: list[str] = []
    page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("response", lambda response: wrong.append(response.url) if response.status >= 400 else None)
    page.on("request", lambda r: None if r.url.startswith((address, "data:", "blob:")) else wrong.append(r.url))
    return page, wrong


@pytest.mark.parametrize("theme", THEMES)
def test_pages_show_everything(browser: Any, address: str, theme: str) -> None:
    page, wrong = opened(browser, address, theme)
    screenshots = os.environ.get("QLORA_SCREENSHOTS")
    seen = 0
    for name in PAGES:
        page.goto(f"{address}/{name}", wait_until="load")
        sizes = page.eval_on_selector_all("img", "images => images.map(i => [i.src, i.naturalWidth])")
        assert not [source for source, width in sizes if width == 0], name
        seen += len(sizes)
        assert page.eval_on_selector("body", "body => body.dataset.mdColorScheme") == THEMES[theme]
        assert page.eval_on_selector("h1", "title => title.innerText.length") > 0, name
        if screenshots:
            page.screenshot(path=f"{screenshots}/{theme}_{name.replace('/', '_')}.png")
    assert seen > 8
    assert wrong == []


def test_the_search_finds_five_tasks(browser: Any, address: str) -> None:
    page, wrong = opened(browser, address, "light")
    for query, expected in {
        "install": "installation.html",
        "fine-tune own data": "finetune.html",
        "bitsandbytes script": "bitsandbytes.html",
        "serve the result": "serving.html",
        "call the operators": "operators.html",
    }.items():
        page.goto(f"{address}/index.html")
        page.click("input.md-search__input")
        page.keyboard.type(query)
        page.wait_for_function(
            "name => [...document.querySelectorAll('.md-search-result__link')]"
            ".slice(0, 8).some(link => link.pathname == name)",
            arg=f"/{expected}",
        )
    assert wrong == []


def test_links_of_the_built_pages_lead_somewhere() -> None:
    """Also those in text that MkDocs does not check, such as docstrings."""
    import html.parser
    import urllib.parse

    class Found(html.parser.HTMLParser):
        def __init__(self) -> None:
            super().__init__()
            self.links: list[str] = []
            self.ids: set[str] = set()

        def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
            fields = dict(attributes)
            self.links += [value for key in ("href", "src") if (value := fields.get(key))]
            self.ids |= {value for key in ("id", "name") if (value := fields.get(key))}

    parsed = {}
    for path in SITE.rglob("*.html"):
        parsed[path] = found = Found()
        found.feed(path.read_text())
    broken = []
    for path, found in parsed.items():
        if path.name == "404.html":
            continue  # whose links begin at the root of the host
        for link in found.links:
            target = urllib.parse.urlsplit(link)
            if target.scheme or target.netloc:
                continue
            to = (path.parent / urllib.parse.unquote(target.path)).resolve() if target.path else path
            to = to / "index.html" if to.is_dir() else to
            anchor = urllib.parse.unquote(target.fragment)
            if not to.exists() or (anchor and to in parsed and anchor not in parsed[to].ids):
                broken.append(f"{path.relative_to(SITE)}: {link}")
    assert broken == []
