"""The run's home, end to end: a real run with people who sign in, seen by real browsers, broad and narrow, in both
languages. Where KANTHA_PICTURES names a folder, what each page looks like goes there: docs/pictures is made so."""

import io
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from canaries import CLIENT_SECRET
from chromium import CHROMIUM, CHROMIUM_ARGUMENTS, MARKS
from commands import Command, Run, wait_for
from hub_accounts import CLIENT_ID, Accounts, serving
from PIL import Image

from kantha.coordinator.rundir import RunDirectory
from kantha.spec import PRESETS
from kantha.volunteer.folders import samples_given

sync_api = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe is not installed")

PATIENCE = 60_000  # milliseconds
START_SECONDS = 120.0
CONSOLE_SECONDS = 75.0  # from the desk to every volunteer's console: two renewals, and the way
LOOKS = {
    "desktop-en": {"viewport": {"width": 1280, "height": 900}, "locale": "en-GB", "color_scheme": "light"},
    "desktop-bn": {"viewport": {"width": 1280, "height": 900}, "locale": "bn-BD", "color_scheme": "dark"},
    "phone-en": {"viewport": {"width": 360, "height": 740}, "locale": "en-GB", "color_scheme": "dark"},
    "phone-bn": {"viewport": {"width": 360, "height": 740}, "locale": "bn-BD", "color_scheme": "light"},
}
PICTURED = ("desktop-en", "phone-bn")
HOSTILE = '<img src=x onerror="alert(1)">'

pytestmark = [*MARKS, pytest.mark.slow, pytest.mark.swarm, pytest.mark.timeout(900)]


class Person:
    """In a browser of her own, with what went wrong in it."""

    def __init__(self, browser: "sync_api.Browser", url: str, name: str = "", look: str = "desktop-en") -> None:
        self.name, self.look, self.url = name, look, url
        self.errors: list[str] = []
        self.hosts: set[str] = set()
        context = browser.new_context(**LOOKS[look])
        context.on("request", lambda request: self.hosts.add("/".join(request.url.split("/")[:3])))
        self.page = context.new_page()
        self.page.set_default_timeout(PATIENCE)
        # a violated Content-Security-Policy is an error in the console, too
        self.page.on("console", lambda each: self.errors.append(each.text) if each.type == "error" else None)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))

    def open(self, path: str) -> "sync_api.Page":
        self.page.goto(f"{self.url}/{path}")
        return self.page

    def sign_in(self, to: str = "me") -> "sync_api.Page":
        self.open(f"sign-in?to={to}")
        self.page.get_by_label("Username").fill(self.name)
        self.page.get_by_role("button", name="Authorize").click()
        self.page.wait_for_url(f"{self.url}/{to}")
        return self.page

    def check(self, name: str = "") -> None:
        """What is open fits, was quiet, is usable by everybody, and asked nobody else for anything."""
        self.page.wait_for_load_state()
        assert self.page.locator("html").get_attribute("lang") == self.look[-2:]
        found = axe.Axe().run(self.page).response["violations"]
        assert [(each["id"], [node["html"] for node in each["nodes"]]) for each in found] == []
        assert self.page.evaluate("document.documentElement.scrollWidth") == self.page.viewport_size["width"]  # type: ignore[index]
        assert self.errors == []
        folder = os.environ.get("KANTHA_PICTURES")
        if folder and name and self.look in PICTURED:
            picture = Image.open(io.BytesIO(self.page.screenshot(full_page=True)))
            # a cloth has few colours, and pictures weigh on every clone
            picture.convert("RGB").quantize(128).save(Path(folder) / f"{name}-{self.look}.png", optimize=True)


class Home(Run):
    """A demo run that people sign in to, and those who help."""

    def __init__(self, folder: Path, run_dir: Path, hub: Accounts) -> None:
        super().__init__(folder, run_dir)
        self.hub = hub

    def members(self, *arguments: str) -> None:
        command = self.start(f"organizer-{len(self.commands)}", "members", str(self.run_dir), *arguments)
        assert command.process.wait(START_SECONDS) == 0, command.output()

    def help(self, name: str) -> Command:
        """A volunteer that signs in by a token, where there is no browser."""
        token = {"HF_TOKEN": self.hub.add_token(name)}
        arguments = ["join", self.url, "--token", "--threads", "1"]
        return self.start(f"{name}-{len(self.commands)}", *arguments, env=token)

    def given(self) -> int:
        """Samples that count, as all volunteers counted themselves."""
        return samples_given(RunDirectory.open(self.run_dir).spec.fingerprint, self.folder / "home")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Home]:
    folder = tmp_path_factory.mktemp("home")
    run_dir = folder / "run"
    RunDirectory.create(run_dir, PRESETS["demo"], lambda _: None)
    client = run_dir / "keys" / "oauth.json"
    client.touch(mode=0o600)
    client.write_text(json.dumps({"client_id": CLIENT_ID, "client_secret": CLIENT_SECRET}))
    with serving() as hub, pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_ENDPOINT", hub.url)
        for name in ("asha", "rafiq", "mitu", "nila"):
            hub.add(name)
        home = Home(folder, run_dir, hub)
        try:
            home.serve(0, "--sign-in", "huggingface")
            hub.redirect_uris.add(f"{home.url}/sign-in/callback")
            home.members("moderator", "mitu")
            home.members("approve", "mitu", "asha", "rafiq")
            home.help("asha")
            home.wait_for_volunteer("asha", START_SECONDS)
            yield home
        finally:
            home.end()


@pytest.fixture(scope="module")
def browser() -> Iterator["sync_api.Browser"]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=CHROMIUM_ARGUMENTS)
        yield browser
        browser.close()


@pytest.mark.parametrize("look", ["desktop-en", "phone-bn"])
def test_the_curve_grows_and_a_volunteer_comes_and_goes_before_ones_eyes(
    browser: "sync_api.Browser", home: Home, look: str
) -> None:
    onlooker = Person(browser, home.url, look=look)
    page = onlooker.open("")
    page.evaluate("window.notReloaded = true")
    grown = "least => (window.Bokeh?.documents[0]?.get_model_by_name('rounds')?.get_length() ?? 0) >= least"
    page.wait_for_function(grown, arg=1)
    shown = page.evaluate("() => Bokeh.documents[0].get_model_by_name('rounds').get_length()")
    page.wait_for_function(grown, arg=shown + 2)

    helping = page.locator("#helping tbody th")
    sync_api.expect(helping).to_have_text(["asha"])
    rafiq = home.help("rafiq")
    sync_api.expect(helping).to_have_text(["asha", "rafiq"], timeout=1_000 * START_SECONDS)
    assert rafiq.leave() == 0, rafiq.output()
    sync_api.expect(helping).to_have_text(["asha"])
    assert page.evaluate("window.notReloaded")
    assert onlooker.errors == []
    assert onlooker.hosts == {home.url}


@pytest.mark.parametrize(("look", "name"), [("phone-en", "nila"), ("desktop-bn", "tuli")])
def test_who_asks_is_let_in_by_a_moderator(browser: "sync_api.Browser", home: Home, look: str, name: str) -> None:
    home.hub.add(name)
    newcomer = Person(browser, home.url, name, look)
    page = newcomer.sign_in()
    page.locator("#next form button").click()
    standing = page.locator("#standing")
    sync_api.expect(standing).to_contain_text("⏳")
    page.evaluate("window.notReloaded = true")
    mitu = Person(browser, home.url, "mitu", look)
    desk = mitu.sign_in("desk")
    desk.locator("#requests li").filter(has_text=name).locator("button[value=approve]").click()
    sync_api.expect(desk.locator(".said")).to_contain_text(f"{name} ✅")
    sync_api.expect(standing).to_contain_text("✅")
    assert page.evaluate("window.notReloaded")
    for person in (newcomer, mitu):
        person.check()


def test_an_announcement_reaches_every_page_and_every_volunteers_console(
    browser: "sync_api.Browser", home: Home
) -> None:
    onlooker = Person(browser, home.url, look="phone-bn")
    onlooker.open("")
    mitu = Person(browser, home.url, "mitu")
    desk = mitu.sign_in("desk")
    text = f"সভা আজ রাত আটটায় {HOSTILE} https://meet.example.org/x"
    desk.get_by_label("What everybody shall know").fill(text)
    desk.get_by_role("button", name="Announce").click()
    announced = time.monotonic()
    sync_api.expect(onlooker.page.locator("#news")).to_contain_text(text)
    sync_api.expect(onlooker.page.locator("#news a")).to_have_attribute("href", "https://meet.example.org/x")
    assert onlooker.page.locator("#news img").count() == 0
    asha = next(command for command in home.commands if command.name.startswith("asha"))
    wait_for(lambda: "সভা আজ রাত আটটায়" in asha.output(), CONSOLE_SECONDS, f"the console says it\n{home.story()}")
    assert time.monotonic() - announced < CONSOLE_SECONDS
    onlooker.check()
    desk.get_by_role("button", name="End it").click()
    sync_api.expect(onlooker.page.locator("#news")).not_to_contain_text("সভা")
    desk.get_by_label("What everybody shall know").fill("সভা আজ রাত আটটায়, সবাই আসুন: https://meet.example.org/kantha")
    desk.get_by_role("button", name="Announce").click()
    sync_api.expect(desk.locator(".said")).to_contain_text("Announced")


def test_a_name_is_proposed_voted_for_and_chosen(browser: "sync_api.Browser", home: Home) -> None:
    mitu = Person(browser, home.url, "mitu")
    desk = mitu.sign_in("desk")
    desk.get_by_role("button", name="Set it up").first.click()
    sync_api.expect(desk.locator(".said")).to_contain_text("is set up")
    asha = Person(browser, home.url, "asha", "phone-bn")
    page = asha.sign_in("name")
    for name in ("নকশী কাঁথা", "সেলাই", HOSTILE):
        page.locator("[name=propose]").fill(name)
        page.locator("[name=propose]").press("Enter")
        sync_api.expect(page.locator(".entries .text").filter(has_text=name)).to_be_visible()
    assert page.locator(".entries img").count() == 0

    voter = mitu.open("name")
    entry = voter.locator(".entries li").filter(has_text=HOSTILE)
    entry.get_by_text("Hide…").click()
    entry.get_by_role("textbox").fill("this is no name")
    entry.get_by_role("button", name="Hide").click()
    asha.open("name")
    sync_api.expect(page.get_by_text("this is no name")).to_be_visible()
    asha.check("name-open")
    voter.get_by_role("button", name="Vote for নকশী কাঁথা").click()
    sync_api.expect(voter.get_by_role("button", name="Take back your vote for নকশী কাঁথা")).to_be_visible()
    mitu.check("name-open")
    desk = mitu.open("desk")
    desk.get_by_text("Close now…").click()
    desk.get_by_role("button", name="Close it for good").click()
    sync_api.expect(desk.locator(".said")).to_contain_text("its result is final")
    asha.open("name")
    sync_api.expect(page.locator(".winner")).to_have_text("নকশী কাঁথা")


@pytest.mark.parametrize("look", LOOKS)
def test_every_page_is_for_everybody(browser: "sync_api.Browser", home: Home, look: str) -> None:
    onlooker, mitu = Person(browser, home.url, look=look), Person(browser, home.url, "mitu", look)
    page = onlooker.open("")
    page.wait_for_function("() => window.Bokeh?.documents[0]?.is_idle")
    onlooker.check("run")
    page = onlooker.open("volunteers")
    onlooker.check("volunteers")
    page.locator("#board").get_by_role("link", name="asha").click()
    page.wait_for_url("**/volunteers/*")
    onlooker.check("volunteer")
    page.goto(page.url + "/certificate")
    onlooker.check("certificate")
    for path in ("join", "milestones"):
        onlooker.open(path)
        onlooker.check(path)
    for path in ("name", "polls", "api/docs"):
        onlooker.open(path)
        onlooker.check()
    for path in ("me", "desk"):
        if path == "me":
            mitu.sign_in()
        mitu.open(path)
        mitu.page.locator("details").evaluate_all("all => all.forEach(each => (each.open = true))")
        mitu.check(path)
    assert onlooker.hosts == {home.url}


def test_the_totals_are_what_the_volunteers_counted(browser: "sync_api.Browser", home: Home) -> None:
    for command in home.commands[1:]:
        if command.process.poll() is None:
            assert command.leave() == 0, command.output()
    wait_for(lambda: (s := home.status()) and not s.volunteers, 60, f"all have left\n{home.story()}")
    given = home.given()
    assert given > 0
    status = home.status()
    assert status is not None
    assert status.samples == given
    page = Person(browser, home.url).open("")
    sync_api.expect(page.locator("#figure-samples")).to_have_text(f"{given:,}")
    everybody = httpx.get(f"{home.url}/api/v1/export/volunteers.json").json()
    assert sum(row["samples"] for row in everybody) == given
    rounds = httpx.get(f"{home.url}/api/v1/export/rounds.json").json()
    assert sum(row["samples"] for row in rounds) == given
