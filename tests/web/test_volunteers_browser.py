"""The volunteers' pages in a real Chromium: on a desk and on a phone, light and dark, in both languages."""

import os
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from chromium import CHROMIUM, CHROMIUM_ARGUMENTS, MARKS
from giving import give

from kantha.coordinator.service import Coordinator

sync_api = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")

sync_api.expect.set_options(timeout=30_000)
pytestmark = MARKS


@pytest.fixture(scope="module")
def browser() -> Iterator["sync_api.Browser"]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=CHROMIUM_ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture
def number(web_coordinator: Coordinator) -> int:
    """Of somebody who has given for weeks, among others."""
    coordinator = web_coordinator
    for index, name in enumerate(["রফিক", "mitu", "tuli-with-a-rather-long-name", "kobi"]):
        give(
            coordinator.ledger, coordinator.allowlist, name, *((day, 900 * (index + 1)) for day in range(3 * index + 1))
        )
    coordinator.allowlist.found_team("mitu", "বাংলা মডেল ক্লাব")
    return give(
        coordinator.ledger, coordinator.allowlist, "asha", *((day, 100 + 37 * day % 90) for day in range(80) if day % 5)
    )


def picture(page: "sync_api.Page", name: str) -> None:
    """Where KANTHA_PICTURES names a folder, what the page looks like goes there."""
    if folder := os.environ.get("KANTHA_PICTURES"):
        page.screenshot(path=Path(folder) / f"{name}.png", full_page=True)


@pytest.mark.parametrize("width", [1280, 360])
@pytest.mark.parametrize(("scheme", "language"), [("light", "en"), ("dark", "bn")])
def test_nothing_is_cut_off_or_out_of_order(
    browser: "sync_api.Browser", coordinator_url: str, number: int, width: int, scheme: str, language: str
) -> None:
    context = browser.new_context(
        viewport={"width": width, "height": 800}, color_scheme=scheme, extra_http_headers={"Accept-Language": language}
    )
    page, errors, hosts = context.new_page(), [], set()
    # a violated Content-Security-Policy is an error in the console, too
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("request", lambda request: hosts.add("/".join(request.url.split("/")[:3])))
    page.goto(f"{coordinator_url}/sign-in?to=me")
    page.locator("#name").fill("asha")
    page.locator("#main button").click()
    page.locator("details.forget summary").click()
    for name, path in [
        ("me", "me"),
        ("volunteers", "volunteers"),
        ("teams", "volunteers?of=teams"),
        ("volunteer", f"volunteers/{number}"),
        ("certificate", f"volunteers/{number}/certificate"),
    ]:
        if name != "me":
            page.goto(f"{coordinator_url}/{path}")
        page.wait_for_load_state("networkidle")
        picture(page, f"{name}-{width}-{scheme}-{language}")
        assert page.evaluate("document.documentElement.scrollWidth") <= width, name
        assert page.locator("h1").count() == 1
    certificate = page.locator("#certificate")
    assert certificate.evaluate("image => image.complete && image.naturalWidth") == 1200
    assert errors == []
    assert hosts == {coordinator_url}
    context.close()


def test_a_certificate_to_keep_to_share_and_to_print(
    browser: "sync_api.Browser", coordinator_url: str, number: int, tmp_path: Path
) -> None:
    page = browser.new_page()
    page.goto(f"{coordinator_url}/volunteers/{number}")
    page.get_by_role("link", name="Certificate of contribution").click()
    with page.expect_download() as download:
        page.get_by_role("button", name="PNG").click()
    assert download.value.suggested_filename == f"certificate-{number}.png"
    download.value.save_as(tmp_path / "certificate.png")
    png = (tmp_path / "certificate.png").read_bytes()
    assert struct.unpack(">II", png[16:24]) == (2400, 1696)
    assert len(png) > 100_000  # it is drawn, and no blank sheet
    with page.expect_download() as download:
        page.get_by_role("link", name="SVG").click()
    assert download.value.suggested_filename == f"certificate-{number}.svg"
    page.emulate_media(media="print")
    sync_api.expect(page.locator("#certificate")).to_be_visible()
    for hidden in ("nav", "#png", "footer", "h1", "h2"):
        assert not page.locator(hidden).first.is_visible()
    assert page.pdf(prefer_css_page_size=True).count(b"/Type /Page\n") == 1
    page.close()
