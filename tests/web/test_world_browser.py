"""A browser looks at the pages for the rest of the world, on a phone and on a desk, in both languages."""

from collections.abc import Iterator

import pytest
from chromium import CHROMIUM, CHROMIUM_ARGUMENTS, MARKS

from kantha.coordinator.milestones import _Row
from kantha.coordinator.service import Coordinator

playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe is not installed")
pytestmark = MARKS


@pytest.fixture(scope="module")
def chromium() -> Iterator["playwright.Browser"]:
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=CHROMIUM_ARGUMENTS)
        yield browser
        browser.close()


@pytest.mark.parametrize("language", ["en", "bn"])
@pytest.mark.parametrize("width", [360, 1280])
def test_pages_fit_load_and_break_no_rule(
    chromium: "playwright.Browser", coordinator_url: str, web_coordinator: Coordinator, width: int, language: str
) -> None:
    with web_coordinator.ledger.database.session() as session:
        session.add_all(
            [
                _Row(key="samples 1000", kind="samples", number=1000, text="", round=3, time=1.78e9),
                _Row(key="poll opened name", kind="poll opened", number=0, text="কী নাম? " * 20, round=None, time=1.7e9),
            ]
        )
    context = chromium.new_context(viewport={"width": width, "height": 800}, locale=language)
    page = context.new_page()
    wrong: list[str] = []
    page.on("console", lambda message: wrong.append(message.text) if message.type in ("error", "warning") else None)
    page.on("requestfailed", lambda request: wrong.append(request.url))
    page.on("response", lambda answer: wrong.append(f"{answer.status} {answer.url}") if answer.status >= 400 else None)
    for path in ("milestones", "api/docs"):
        page.goto(f"{coordinator_url}/{path}")
        assert page.evaluate("document.documentElement.lang") == language
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        loaded = page.evaluate("[...document.images].map(image => image.complete && image.naturalWidth > 40)")
        assert loaded == ([True] * 4 if path == "milestones" else [])
        assert axe.Axe().run(page).response["violations"] == []
    page.goto(f"{coordinator_url}/badge/samples.svg")
    box, text = (page.locator(f"{name} >> nth=0").bounding_box() for name in ("rect", "text"))
    assert text is not None
    assert box is not None
    assert box["x"] < text["x"]
    assert text["x"] + text["width"] < box["x"] + box["width"]
    assert wrong == []
    context.close()
