"""Polls and the desk in a real Chromium: two people at once, live, on a phone, in the dark, in Bengali."""

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from chromium import CHROMIUM, CHROMIUM_ARGUMENTS, MARKS

from kantha.coordinator.service import Coordinator
from kantha.swarm.identity import PeerIdentity
from kantha.swarm.membership import MembershipRequest

sync_api = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe is not installed")

PATIENCE = 30_000  # milliseconds
PHONE: dict[str, Any] = {"viewport": {"width": 360, "height": 740}, "color_scheme": "dark", "locale": "bn"}
DESK: dict[str, Any] = {"viewport": {"width": 1280, "height": 900}, "color_scheme": "light", "locale": "en"}
sync_api.expect.set_options(timeout=PATIENCE)

pytestmark = MARKS


@pytest.fixture(scope="module")
def browser() -> Iterator["sync_api.Browser"]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=CHROMIUM_ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture
def url(coordinator_url: str, web_coordinator: Coordinator, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(web_coordinator, "address", coordinator_url)
    return coordinator_url


@dataclass
class Person:
    """In a browser of her own, signed in, with what went wrong in it."""

    page: "sync_api.Page"
    url: str
    errors: list[str] = field(default_factory=list)
    strange: set[str] = field(default_factory=set)  # requests to other hosts

    def open(self, path: str) -> None:
        self.page.goto(f"{self.url}/{path}")

    def check(self, picture: str) -> None:
        """What is open is usable by everybody, fits, and was quiet. Where KANTHA_PICTURES names a folder, what it looks
        like goes there."""
        width = self.page.viewport_size["width"]  # type: ignore[index]
        if folder := os.environ.get("KANTHA_PICTURES"):
            self.page.screenshot(path=Path(folder) / f"{picture}-{width}.png", full_page=True)
        found = axe.Axe().run(self.page).response["violations"]
        assert [(each["id"], [node["html"] for node in each["nodes"]]) for each in found] == []
        assert self.page.evaluate("document.documentElement.scrollWidth") == width
        assert self.errors == []
        assert self.strange == set()


def come(browser: "sync_api.Browser", url: str, name: str, options: dict[str, Any]) -> Person:
    person = Person(browser.new_context(**options).new_page(), url)
    # a violated Content-Security-Policy is an error in the console, too
    person.page.on("console", lambda each: person.errors.append(each.text) if each.type == "error" else None)
    person.page.on("pageerror", lambda error: person.errors.append(str(error)))
    person.page.on("request", lambda each: None if each.url.startswith(url) else person.strange.add(each.url))
    person.open("sign-in?to=name")
    person.page.locator("#name").fill(name)
    person.page.keyboard.press("Enter")
    person.page.wait_for_url("**/name")
    return person


def test_a_name_is_proposed_voted_for_and_chosen_while_others_look(
    browser: "sync_api.Browser", url: str, web_coordinator: Coordinator
) -> None:
    mitu = come(browser, url, "Mitu", DESK)
    web_coordinator.allowlist.set_moderator("Mitu", True, "organizer")
    asha = come(browser, url, "Asha", PHONE)
    asha.check("name-none")

    mitu.open("desk")
    mitu.page.get_by_role("button", name="Set it up").click()
    sync_api.expect(mitu.page.locator(".said")).to_contain_text("is set up")

    asha.open("name")
    asha.page.locator("[name=propose]").fill("নকশী কাঁথা")
    asha.page.keyboard.press("Enter")
    sync_api.expect(asha.page.locator(".entries .text")).to_have_text("নকশী কাঁথা")
    asha.check("name-open")

    mitu.open("name")
    mitu.page.evaluate("window.notReloaded = true")
    votes = mitu.page.locator(".entries [data-live]")
    sync_api.expect(votes).to_have_text("1 vote")
    asha.page.locator(".entries button").click()  # takes her vote back
    sync_api.expect(votes).to_have_text("0 votes")
    assert mitu.page.evaluate("window.notReloaded")

    mitu.page.get_by_role("textbox", name="Propose").fill("নকশি কাঁথা")
    mitu.page.get_by_role("button", name="Propose").click()
    sync_api.expect(mitu.page.get_by_role("heading", level=1)).to_have_text("Is it one of these?")
    mitu.check("name-alike")
    mitu.page.get_by_role("button", name="Vote for নকশী কাঁথা").click()
    sync_api.expect(mitu.page.get_by_role("button", name="Take back your vote for নকশী কাঁথা")).to_be_visible()
    mitu.check("name-voted")

    mitu.open("desk")
    mitu.page.get_by_text("Close now…").click()
    mitu.page.get_by_role("button", name="Close it for good").click()
    sync_api.expect(mitu.page.locator(".said")).to_contain_text("its result is final")
    asha.open("name")
    sync_api.expect(asha.page.locator(".winner")).to_have_text("নকশী কাঁথা")
    asha.check("name-closed")
    asha.open("polls")
    asha.check("polls")


@pytest.mark.parametrize("options", [DESK, PHONE | {"locale": "en"}], ids=["desktop", "phone"])
def test_what_moderators_do_at_the_desk_is_on_open_pages_within_seconds(
    browser: "sync_api.Browser", url: str, web_coordinator: Coordinator, identity: PeerIdentity, options: dict[str, Any]
) -> None:
    mitu, asha = come(browser, url, "Mitu", options), come(browser, url, "Asha", PHONE)
    web_coordinator.allowlist.set_moderator("Mitu", True, "organizer")
    web_coordinator.allowlist.ask("Asha")
    now = time.time()
    web_coordinator.polls.make("name", "Its name", "", now - 60, now + 3600, "Mitu")
    request = MembershipRequest.signed(
        identity, web_coordinator.run.spec.fingerprint, username="Asha", service="local", instance="laptop"
    )
    web_coordinator.admission.admit(request)
    asha.open("name")
    news = asha.page.locator("#news")

    mitu.open("desk")
    mitu.page.locator("details").evaluate_all("all => all.forEach(each => (each.open = true))")
    mitu.check("desk")
    mitu.page.get_by_label("What everybody shall know").fill("সভা আজ রাতে: https://meet.example.org/x")
    mitu.page.get_by_role("button", name="Announce").click()
    sync_api.expect(news.get_by_role("link")).to_have_attribute("href", "https://meet.example.org/x")
    mitu.page.get_by_label("Reason, which everybody is told").fill("the text is mended")
    mitu.page.get_by_role("button", name="Pause the run").click()
    sync_api.expect(news).to_contain_text("the text is mended")
    asha.check("name-paused")
    mitu.page.get_by_role("button", name="Let it go on").click()
    sync_api.expect(news).not_to_contain_text("the text is mended")
    mitu.page.locator("#requests").get_by_role("button", name="Approve").click()
    sync_api.expect(mitu.page.locator(".said")).to_have_text("Approve: Asha ✅")
    mitu.page.get_by_role("button", name="Free the place of Asha").click()
    sync_api.expect(mitu.page.locator(".said")).to_contain_text("is free")
    mitu.check("desk-done")
