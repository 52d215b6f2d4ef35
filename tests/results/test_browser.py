"""The page of ``metarun-report`` in Chromium: ``pip install -e '.[browser]'``, and chromium from the distribution."""

import shutil

import pytest
from results.test_report import runs  # noqa: F401 (a fixture)

pytestmark = pytest.mark.slow

BROKEN = "Array.from(document.images).filter(image => !image.complete || image.naturalWidth === 0).length"
COLUMN = "table => Array.from(table.tBodies[0].rows).map(row => row.cells[3].textContent)"


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="needs pip install -e '.[browser]'")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("needs Chromium, such as the distribution's package")
    with playwright.sync_playwright() as started:
        # Without its sandbox, because containers rarely allow one; the page is our own.
        yield started.chromium.launch(executable_path=chromium, args=["--no-sandbox"])


@pytest.mark.parametrize("width", [400, 1400])
def test_the_page_in_a_browser(browser, runs, tmp_path, width):  # noqa: F811
    page = browser.new_page(viewport={"width": width, "height": 900})
    said, asked = [], []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.on("dialog", lambda dialog: said.append(dialog.message))
    page.goto((runs / "pages" / "report.html").as_uri())
    assert page.evaluate(BROKEN) == 0
    # Tables scroll within themselves; the page never scrolls sideways.
    assert page.evaluate("document.documentElement.scrollWidth") == width
    table = page.locator("table").nth(1)
    heading = table.locator("th button").nth(3)
    heading.click()
    rising = table.evaluate(COLUMN)
    assert [float(text.split()[0]) for text in rising] == sorted(float(text.split()[0]) for text in rising)
    assert table.locator("th").nth(3).get_attribute("aria-sort") == "ascending"
    heading.press("Enter")
    assert table.evaluate(COLUMN) == rising[::-1]
    page.screenshot(path=tmp_path / f"{width}.png", full_page=True)
    assert not said
    assert all(url.startswith(("file:", "data:")) for url in asked)
    assert sum(url.startswith("file:") for url in asked) == 1
