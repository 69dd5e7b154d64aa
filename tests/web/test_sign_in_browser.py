"""Sign-in, pairing and moderation with real Chromium, at a real coordinator process and a local hub."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from chromium import CHROMIUM, CHROMIUM_ARGUMENTS, MARKS
from commands import Command, wait_for
from hub_accounts import CLIENT_ID, CLIENT_SECRET, Accounts, serving

from kantha.api import RunDescription
from kantha.swarm.identity import PeerIdentity
from kantha.swarm.membership import MembershipRequest

sync_api = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")

PATIENCE = 30_000  # milliseconds
START_SECONDS = 90.0
sync_api.expect.set_options(timeout=PATIENCE)

pytestmark = MARKS


@pytest.fixture
def hub() -> Iterator[Accounts]:
    with serving() as hub:
        hub.add("asha", "bengali-nlp")
        hub.add("mitu")
        yield hub


@pytest.fixture
def coordinator(run_path: Path, tmp_path: Path, hub: Accounts, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of a coordinator process that people sign in to by the hub; mitu is its moderator."""
    client = run_path / "keys" / "oauth.json"
    client.touch(mode=0o600)
    client.write_text(json.dumps({"client_id": CLIENT_ID, "client_secret": CLIENT_SECRET}))
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    moderators = Command(tmp_path, "members", "members", str(run_path), "moderator", "mitu")
    moderators.process.wait(START_SECONDS)
    assert moderators.process.returncode == 0, moderators.output()
    serve = Command(tmp_path, "serve", "serve", str(run_path), "--port", "0", "--sign-in", "huggingface")
    try:
        wait_for(lambda: "to join:" in serve.output() or serve.process.poll() is not None, START_SECONDS, "it serves")
        assert serve.process.poll() is None, serve.output()
        address = serve.output().split("the run's page: ")[1].split()[0]
        hub.redirect_uris.add(f"{address}/sign-in/callback")
        yield address
        for secret in (CLIENT_SECRET, "hf_oauth_canary"):
            assert secret not in serve.output()
    finally:
        serve.process.terminate()
        serve.process.wait(START_SECONDS)


@pytest.fixture(scope="module")
def browser() -> Iterator["sync_api.Browser"]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=CHROMIUM_ARGUMENTS)
        yield browser
        browser.close()


class Person:
    """In a browser of her own, with what went wrong in it."""

    def __init__(self, browser: "sync_api.Browser", name: str, **options: object) -> None:
        self.name = name
        self.errors: list[str] = []
        self.hosts: set[str] = set()
        context = browser.new_context(**options)
        context.on("request", lambda request: self.hosts.add("/".join(request.url.split("/")[:3])))
        self.page = context.new_page()
        # a violated Content-Security-Policy is an error in the console, too
        self.page.on("console", lambda message: self.errors.append(message.text) if message.type == "error" else None)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))

    def allow(self) -> None:
        """On the hub's page, which is open."""
        self.page.get_by_label("Username").fill(self.name)
        self.page.get_by_role("button", name="Authorize").click()


class Machine:
    """One that would like to help: it asks as `kantha join` does, and can be asked what it was answered."""

    def __init__(self, folder: Path, address: str, **fields: object) -> None:
        self.address, self.fields = address, fields
        self.identity = PeerIdentity(folder / "peer.key")
        self.run = RunDescription.model_validate_json(httpx.get(f"{address}/api/v1/run").content)

    def ask(self) -> httpx.Response:
        request = MembershipRequest.signed(self.identity, self.run.fingerprint, **self.fields)
        return httpx.post(
            f"{self.address}/api/v1/memberships",
            content=request.model_dump_json(),
            headers={"Content-Type": "application/json"},
        )


def picture(person: Person, name: str) -> None:
    """Where KANTHA_PICTURES names a folder, what the page looks like goes there: broad and narrow, light and dark."""
    folder = os.environ.get("KANTHA_PICTURES")
    if folder is None:
        return
    for width in (1100, 360):
        for scheme in ("light", "dark"):
            person.page.set_viewport_size({"width": width, "height": 800})
            person.page.emulate_media(color_scheme=scheme)
            person.page.screenshot(path=Path(folder) / f"{name}-{width}-{scheme}.png", full_page=True)


def test_from_a_strange_machine_to_a_member(
    browser: "sync_api.Browser", coordinator: str, hub: Accounts, tmp_path: Path
) -> None:
    machine = Machine(tmp_path, coordinator, service="kaggle", instance="notebook 7")
    waiting = machine.ask().json()
    assert waiting["state"] == "sign_in"

    asha = Person(browser, "asha")
    asha.page.goto(f"{coordinator}/{waiting['path']}")
    sync_api.expect(asha.page.get_by_text(waiting["code"])).to_be_visible()
    assert asha.page.get_by_text("notebook 7").count() == 0
    picture(asha, "pair-signed-out")
    asha.page.get_by_role("link", name="Sign in with Hugging Face").click()
    asha.allow()
    sync_api.expect(asha.page.get_by_role("heading", name="Is this your machine?")).to_be_visible()
    assert asha.page.url == f"{coordinator}/{waiting['path']}"
    sync_api.expect(asha.page.get_by_text("notebook 7")).to_be_visible()
    picture(asha, "pair")
    asha.page.get_by_role("button", name="Yes, this is my machine").click()
    standing = asha.page.get_by_role("status")
    sync_api.expect(standing).to_contain_text("⏳")
    assert asha.page.url == f"{coordinator}/me"
    picture(asha, "me-asked")
    asha.page.evaluate("window.notReloaded = true")
    assert machine.ask().json()["state"] == "asked"

    mitu = Person(browser, "mitu")
    mitu.page.goto(coordinator)
    mitu.page.get_by_role("link", name="Sign in").click()
    mitu.allow()
    mitu.page.get_by_role("link", name="mitu").click()
    mitu.page.get_by_role("link", name="Desk").click()
    request = mitu.page.locator("#requests li")
    sync_api.expect(request).to_contain_text("asha")
    picture(mitu, "desk")
    request.get_by_role("button", name="Approve").click()
    sync_api.expect(mitu.page.get_by_text("Nobody waits for an answer.")).to_be_visible()

    sync_api.expect(standing).to_contain_text("✅")
    answer = machine.ask()
    assert answer.status_code == 201
    assert answer.json()["certificate"]["membership"]["username"] == "asha"
    sync_api.expect(asha.page.get_by_text("Kaggle: notebook 7")).to_be_visible()
    assert asha.page.evaluate("window.notReloaded")
    picture(asha, "me")
    asha.page.goto(coordinator)
    sync_api.expect(asha.page.get_by_role("link", name="asha")).to_contain_text("✅")
    picture(asha, "run")

    for person in (asha, mitu):
        assert person.errors == []
        assert person.hosts == {coordinator, hub.url}
    assert set(hub.scopes) == {"openid profile"}


def test_it_works_without_javascript_on_a_phone(browser: "sync_api.Browser", coordinator: str, tmp_path: Path) -> None:
    look = {"java_script_enabled": False, "viewport": {"width": 360, "height": 740}}
    asha = Person(browser, "asha", **look)
    asha.page.goto(f"{coordinator}/me")
    asha.allow()
    asha.page.get_by_role("button", name="Ask to join").click()
    sync_api.expect(asha.page.get_by_role("status")).to_contain_text("⏳")

    mitu = Person(browser, "mitu", **look)
    mitu.page.goto(f"{coordinator}/desk")
    mitu.allow()
    request = mitu.page.locator("#requests li")
    request.get_by_text("Refuse, ban…").click()
    request.get_by_role("textbox").fill("Please say hello in the chat first <b>.")
    picture(mitu, "desk-open")
    request.get_by_role("textbox").press("Enter")  # never approves
    person = mitu.page.locator("#people li").filter(has_text="asha")
    sync_api.expect(person).to_contain_text("⛔ refused by mitu")
    picture(mitu, "desk-refused")
    asha.page.goto(f"{coordinator}/me")
    sync_api.expect(asha.page.get_by_role("status")).to_contain_text("Please say hello in the chat first <b>.")
    picture(asha, "me-refused")

    mitu.page.get_by_label("Usernames").fill("@nila\ntuli\n")
    mitu.page.get_by_label("or a file").set_input_files(
        {"name": "people.csv", "mimeType": "text/csv", "buffer": b"username\nkobi\n"}
    )
    person.get_by_role("checkbox").check()
    mitu.page.get_by_label("What to do").select_option("approve")
    mitu.page.get_by_role("button", name="Do it for all of them").click()
    sync_api.expect(mitu.page.get_by_role("status")).to_contain_text("approve: ")
    for name in ("asha", "nila", "tuli", "kobi"):
        assert "✅ approved by mitu" in mitu.page.locator("#people li").filter(has_text=name).inner_text()
    picture(mitu, "desk-people")
    for one in (asha, mitu):
        assert one.page.evaluate("document.documentElement.scrollWidth") == 360

    asha.page.goto(f"{coordinator}/pair?code=ACDE-FGHJ")
    sync_api.expect(asha.page.get_by_text("No machine waits with the code ACDE-FGHJ")).to_be_visible()
    picture(asha, "pair-gone")
    asha.page.get_by_role("button", name="Sign out").click()
    sync_api.expect(asha.page.get_by_role("link", name="Sign in")).to_be_visible()
