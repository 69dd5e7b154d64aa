"""Sign-in, pairing and moderation with real Chromium, real `kantha` processes and a local hub."""

import contextlib
import json
import os
import pty
import re
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import parse_qs

import pytest
from canaries import ACCESS_TOKEN, CLIENT_SECRET
from chromium import CHROMIUM, CHROMIUM_ARGUMENTS, MARKS
from commands import Command, Run, served, small_run, wait_for
from hub_accounts import CLIENT_ID, Accounts, serving

from kantha.errors import MembershipError

sync_api = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")

PATIENCE = 30_000  # milliseconds
START_SECONDS = 90.0
OUT_SECONDS = 120.0  # from a moderator's word to the end of that person's machine, as docs/security-model.md promises
sync_api.expect.set_options(timeout=PATIENCE)

pytestmark = MARKS


@pytest.fixture
def hub() -> Iterator[Accounts]:
    with serving() as hub:
        hub.add("asha", "bengali-nlp")
        hub.add("mitu")
        yield hub


@pytest.fixture
def run(tmp_path: Path, hub: Accounts, monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    """Served, for people who sign in by the hub; mitu is its moderator."""
    run_dir = small_run(tmp_path)
    client = run_dir / "keys" / "oauth.json"
    client.touch(mode=0o600)
    client.write_text(json.dumps({"client_id": CLIENT_ID, "client_secret": CLIENT_SECRET}))
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    with served(tmp_path, run_dir) as run:
        run.serve(0, "--sign-in", "huggingface")
        hub.redirect_uris.add(f"{run.url}/sign-in/callback")
        moderator = run.start("members", "members", str(run_dir), "moderator", "mitu")
        assert moderator.process.wait(START_SECONDS) == 0, moderator.output()
        yield run
        for command in run.commands:
            for secret in (CLIENT_SECRET, ACCESS_TOKEN):
                assert secret not in command.output()


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
        self.sent: list[tuple[str, set[str]]] = []  # forms: where to, and the names of their fields
        context = browser.new_context(**options)
        context.on("request", self._note)
        self.page = context.new_page()
        # a violated Content-Security-Policy is an error in the console, too
        self.page.on("console", lambda message: self.errors.append(message.text) if message.type == "error" else None)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))

    def _note(self, request: "sync_api.Request") -> None:
        self.hosts.add("/".join(request.url.split("/")[:3]))
        if request.method == "POST":
            self.sent.append((request.url, set(parse_qs(request.post_data or ""))))

    def allow(self) -> None:
        """On the hub's page, which is open."""
        self.page.get_by_label("Username").fill(self.name)
        self.page.get_by_role("button", name="Authorize").click()


class Terminal(Command):
    """A `kantha` command in a terminal of its own, where nobody types; what it shows goes to a file, with escapes."""

    def __init__(self, folder: Path, name: str, *arguments: str) -> None:
        self.name = name
        self.log = folder / f"{name}.log"
        self.log.touch()
        self._screen, theirs = pty.openpty()
        termios.tcsetwinsize(theirs, (50, 100))
        self.process = subprocess.Popen(
            [sys.executable, "-m", "kantha", *arguments],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env={**os.environ, "KANTHA_HOME": str(folder / "home"), "TERM": "xterm-256color"},
            start_new_session=True,
        )
        os.close(theirs)
        threading.Thread(target=self._record, daemon=True).start()

    def _record(self) -> None:
        with self.log.open("wb", buffering=0) as log, contextlib.suppress(OSError):  # all who had it have ended
            while shown := os.read(self._screen, 65_536):
                log.write(shown)
        os.close(self._screen)

    def output(self) -> str:
        return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]|\r", "", super().output())


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


@pytest.mark.slow
@pytest.mark.swarm
@pytest.mark.timeout(600)
@pytest.mark.parametrize("kind", [Terminal, Command], ids=["in a terminal", "without one"])
def test_from_a_clean_terminal_to_a_member_and_out_again(
    browser: "sync_api.Browser", run: Run, hub: Accounts, tmp_path: Path, kind: type[Command]
) -> None:
    link = run.commands[0].output().split("kantha join ")[1].split()[0]
    assert link.startswith(f"{run.url}#")
    machine = kind(tmp_path, "machine", "join", link, "--threads", "1", "--micro-batch", "4")
    run.commands.append(machine)

    def shows(what: str, seconds: float = START_SECONDS) -> None:
        wait_for(lambda: what in machine.output(), seconds, f"the machine says {what!r}\n{run.story()}")
        assert machine.process.poll() is None, run.story()

    shows("    link   ")
    shows("Ctrl-C leaves.")
    code = machine.output().split("    code   ")[1].split()[0]
    link_to_confirm = machine.output().split("    link   ")[1].split()[0]
    drawn = [line for line in machine.output().splitlines() if "█" in line or "▄" in line]
    assert (len(drawn) > 10) == (kind is Terminal), "the QR code is for who sees it"

    # which machine it is, only those learn who say who they are
    asha = Person(browser, "asha")
    asha.page.goto(link_to_confirm)
    sync_api.expect(asha.page.get_by_text(code)).to_be_visible()
    assert asha.page.get_by_text("own machine").count() == 0
    picture(asha, "pair-signed-out")
    asha.page.get_by_role("link", name="Sign in with Hugging Face").click()
    asha.allow()
    sync_api.expect(asha.page.get_by_role("heading", name="Is this your machine?")).to_be_visible()
    assert asha.page.url == link_to_confirm
    sync_api.expect(asha.page.get_by_text(code)).to_be_visible()
    sync_api.expect(asha.page.get_by_text("own machine, ")).to_be_visible()
    picture(asha, "pair")
    asha.page.get_by_role("button", name="Yes, this is my machine").click()

    # ⏳ in both
    standing = asha.page.get_by_role("status")
    sync_api.expect(standing).to_contain_text("⏳ Asked.")
    assert asha.page.url == f"{run.url}/me"
    asha.page.evaluate("window.notReloaded = true")
    picture(asha, "me-asked")
    shows("⏳ Asked.")

    mitu = Person(browser, "mitu")
    mitu.page.goto(run.url)
    mitu.page.get_by_role("link", name="Sign in").click()
    mitu.allow()
    mitu.page.get_by_role("link", name="mitu").click()
    mitu.page.get_by_role("link", name="Desk").click()
    request = mitu.page.locator("#requests li")
    sync_api.expect(request).to_contain_text("asha")
    picture(mitu, "desk")
    request.get_by_role("button", name="Approve").click()
    sync_api.expect(mitu.page.get_by_text("Nobody waits for an answer.")).to_be_visible()

    # ✅ in both, and it begins by itself
    sync_api.expect(standing).to_contain_text("✅ You are in.")
    shows("✅ You are in.")
    sync_api.expect(asha.page.get_by_text("own machine, ")).to_be_visible()
    picture(asha, "me")
    onlooker = Person(browser, "nobody")
    onlooker.page.goto(run.url)
    samples = onlooker.page.get_by_role("row").filter(has_text="asha").get_by_role("cell").nth(1)
    sync_api.expect(samples).to_have_text(re.compile("^[1-9]"), timeout=1_000 * START_SECONDS)
    picture(onlooker, "run")

    # a moderator takes it back: the machine ends and says why, and so does the page
    reason = "Your notebook sends nonsense; write to us."
    member = mitu.page.locator("#people li").filter(has_text="asha")
    member.get_by_text("Suspend, Ban…").click()
    member.get_by_role("textbox").fill(reason)
    picture(mitu, "desk-reason")
    member.get_by_role("button", name="Suspend").click()
    sync_api.expect(mitu.page.locator("#people li").filter(has_text="asha")).to_contain_text("⛔ suspended · by mitu")
    suspended = time.monotonic()
    sync_api.expect(standing).to_contain_text(f"⛔ A moderator suspended you for now: {reason}")
    machine.process.wait(OUT_SECONDS)
    wait_for(lambda: reason in machine.output(), 5, f"the reason\n{run.story()}")
    assert time.monotonic() - suspended < OUT_SECONDS
    assert machine.process.returncode == MembershipError.exit_code
    assert "Traceback" not in machine.output()
    wait_for(lambda: (s := run.status()) and not s.volunteers, 60, f"nobody is at work\n{run.story()}")
    sync_api.expect(asha.page.get_by_text("None is at work right now.")).to_be_visible()
    assert asha.page.evaluate("window.notReloaded")
    picture(asha, "me-suspended")
    asha.page.goto(f"{run.url}/join")
    sync_api.expect(asha.page.locator("#standing")).to_contain_text("⛔ A moderator suspended you for now")

    for person in (asha, mitu):
        assert person.errors == []
        assert person.hosts == {run.url, hub.url}
    # to get in, nothing is typed into a page of ours, nor into the terminal, which has no keys
    assert [sent for sent in asha.sent if sent[0].startswith(run.url)] == [
        (f"{run.url}/pair", {"form", "code", "answer"})
    ]
    assert set(hub.scopes) == {"openid profile"}


@pytest.mark.slow
@pytest.mark.swarm
def test_it_works_without_javascript_on_a_phone(browser: "sync_api.Browser", run: Run) -> None:
    look = {"java_script_enabled": False, "viewport": {"width": 360, "height": 740}}
    asha = Person(browser, "asha", **look)
    asha.page.goto(f"{run.url}/me")
    asha.allow()
    asha.page.get_by_role("button", name="Ask to join").click()
    sync_api.expect(asha.page.get_by_role("status")).to_contain_text("⏳")

    mitu = Person(browser, "mitu", **look)
    mitu.page.goto(f"{run.url}/desk")
    mitu.allow()
    request = mitu.page.locator("#requests li")
    request.get_by_text("Refuse, Ban…").click()
    request.get_by_role("textbox").fill("Please say hello in the chat first <b>.")
    picture(mitu, "desk-open")
    request.get_by_role("textbox").press("Enter")  # never approves
    person = mitu.page.locator("#people li").filter(has_text="asha")
    sync_api.expect(person).to_contain_text("⛔ refused · by mitu")
    picture(mitu, "desk-refused")
    asha.page.goto(f"{run.url}/me")
    sync_api.expect(asha.page.get_by_role("status")).to_contain_text("Please say hello in the chat first <b>.")
    picture(asha, "me-refused")

    mitu.page.get_by_text("Several at once…").click()
    mitu.page.get_by_label("Usernames").fill("@nila\ntuli\n")
    mitu.page.get_by_label("or a file").set_input_files(
        {"name": "people.csv", "mimeType": "text/csv", "buffer": b"username\nkobi\n"}
    )
    person.get_by_role("checkbox").check()
    mitu.page.get_by_label("What to do").select_option("approve")
    mitu.page.get_by_role("button", name="Do it for all of them").click()
    sync_api.expect(mitu.page.get_by_role("status")).to_contain_text("Approve: ")
    for name in ("asha", "nila", "tuli", "kobi"):
        assert "✅ approved · by mitu" in mitu.page.locator("#people li").filter(has_text=name).inner_text()
    picture(mitu, "desk-people")
    for one in (asha, mitu):
        assert one.page.evaluate("document.documentElement.scrollWidth") == 360

    asha.page.goto(f"{run.url}/pair?code=ACDE-FGHJ")
    sync_api.expect(asha.page.get_by_text("No machine waits with the code ACDE-FGHJ")).to_be_visible()
    picture(asha, "pair-gone")
    asha.page.get_by_role("button", name="Sign out").click()
    sync_api.expect(asha.page.get_by_role("link", name="Sign in")).to_be_visible()
