"""The run's page in a real Chromium: live, quiet in the console, and talking to nobody but its own server."""

import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
import uvicorn
from chromium import CHROMIUM, CHROMIUM_ARGUMENTS, MARKS
from fastapi import FastAPI

from kantha.coordinator.status import HeldoutStatus, RoundStatus, RunStatus, VolunteerStatus
from kantha.web.pages import page_router

sync_api = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")

HOSTILE = "<img src=x onerror=alert(1)>"
PATIENCE = 30_000  # milliseconds
sync_api.expect.set_options(timeout=PATIENCE)

pytestmark = MARKS


def make_status(rounds: int, names: list[str]) -> RunStatus:
    finished = [
        RoundStatus(
            round=number,
            samples=256 + number,
            loss=9.19 - number / 20,
            mlm_loss=8.5 - number / 20,
            sop_loss=0.69,
            volunteers=len(names),
            finished=1.7e9 + number,
            failed=number in (4, 43, 44),
            reason=HOSTILE if number in (4, 44) else None,
        )
        for number in range(1, rounds + 1)
    ]
    heldout = [
        HeldoutStatus(
            round=number,
            loss=9.3 - number / 21,
            mlm_loss=8.6 - number / 21,
            mlm_accuracy=number / 1000,
            sop_loss=0.7,
            sop_accuracy=0.5175,
            masked=2300,
            pairs=512,
        )
        for number in range(0, rounds, 5)
    ]
    volunteers = [
        VolunteerStatus(
            name=name,
            peer_id=name,
            state="training",
            round=rounds,
            samples_in_round=20,
            samples=1500 + rounds,
            samples_per_second=7.3,
            loss=6.5,
            device="CPU, 2 cores",
            seconds_since_seen=rounds / 7,
        )
        for name in names
    ]
    return RunStatus(
        name="Bengali ALBERT",
        goal="An ALBERT for Bengali, trained by volunteers.",
        fingerprint="0123abcd",
        address="http://127.0.0.1:8080",
        round=rounds,
        target_batch_size=256,
        samples_in_round=64,
        samples=sum(entry.samples for entry in finished),
        samples_per_second=7.3 * len(names),
        seconds_to_next_round=61.0 + rounds if names else None,
        failed_rounds=sum(entry.failed for entry in finished),
        computing_share=0.99375 - rounds / 10_000 if rounds else None,
        checkpoint_round=rounds // 10 * 10,
        learning_rate=0.01,
        volunteers=volunteers,
        heldout=heldout,
        rounds=finished,
    )


@dataclass
class Run:
    """A coordinator's page over a status that the test changes."""

    url: str
    status: RunStatus


@dataclass
class Visit:
    """A page in its own browser context, with what went wrong in it."""

    page: "sync_api.Page"
    errors: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    def wait_for_points(self, count: int, source: str = "rounds") -> None:
        self.page.wait_for_function(
            "([source, count]) => window.Bokeh?.documents[0]?.is_idle"
            " && Bokeh.documents[0].get_model_by_name(source).get_length() === count",
            arg=[source, count],
            timeout=PATIENCE,
        )

    def wait_for_field(self, name: str, text: str) -> None:
        sync_api.expect(self.page.locator(f"[data-field={name}]")).to_have_text(text)


@pytest.fixture
def run() -> Iterator[Run]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        run = Run(f"http://127.0.0.1:{listener.getsockname()[1]}", make_status(30, ["Asha", "Mitu", "রফিক"]))
        app = FastAPI()
        app.include_router(page_router(lambda: run.status))
        app.get("/api/v1/status", response_model=RunStatus)(lambda: run.status)
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        yield run
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def browser() -> Iterator["sync_api.Browser"]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=CHROMIUM_ARGUMENTS)
        yield browser
        browser.close()


def visit(browser: "sync_api.Browser", run: Run, **options: object) -> Visit:
    context = browser.new_context(**options)
    visit = Visit(context.new_page())
    # A violated Content-Security-Policy is an error in the console, too.
    visit.page.on("console", lambda message: visit.errors.append(message.text) if message.type == "error" else None)
    visit.page.on("pageerror", lambda error: visit.errors.append(str(error)))
    context.on("request", lambda request: visit.requests.append(request.url))
    visit.page.goto(run.url)
    return visit


def test_the_page_lives_without_a_reload(browser: "sync_api.Browser", run: Run) -> None:
    seen = visit(browser, run)
    seen.wait_for_points(30)
    assert seen.page.locator("#volunteers th").all_inner_texts() == ["Asha", "Mitu", "রফিক"]
    painted = """canvases => canvases.some(canvas => {
        const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
        return data.some(value => value > 0);
    })"""
    assert seen.page.locator("#chart canvas").evaluate_all(painted)
    seen.page.evaluate("window.notReloaded = true")

    run.status = make_status(31, ["Asha", "Mitu", "রফিক"])
    seen.wait_for_points(31)
    seen.wait_for_points(7, "heldout")
    seen.wait_for_field("round", "31")
    seen.wait_for_field("loss", "7.64")
    assert seen.page.locator("#rounds li").first.inner_text() == "Round 31: 3 volunteers, 287 samples, loss 7.64"

    shown = "Bokeh.documents[0].get_model_by_name('loss').renderers.filter(r => r.visible).map(r => r.name)"
    assert set(seen.page.evaluate(shown)) == {"total", "total heldout"}
    for curve in ["hidden words", "total"]:
        box = seen.page.get_by_label(curve)
        box.set_checked(not box.is_checked())
    assert set(seen.page.evaluate(shown)) == {"words", "words heldout"}
    seen.page.get_by_label("held-out text").uncheck()
    seen.page.get_by_label("sentence order").check()
    assert set(seen.page.evaluate(shown)) == {"words", "order"}

    assert seen.page.evaluate("window.notReloaded")
    assert seen.errors == []
    assert {url for url in seen.requests if not url.startswith(f"{run.url}/")} == set()


def test_an_empty_run_fills(browser: "sync_api.Browser", run: Run) -> None:
    run.status = make_status(0, [])
    seen = visit(browser, run)
    sync_api.expect(seen.page.get_by_text("The first round is on its way: 64 of 256 samples.")).to_be_visible()
    sync_api.expect(seen.page.get_by_text("Be the first")).to_be_visible()
    assert seen.page.locator("#chart canvas").count() == 0

    run.status = make_status(5, ["Asha", HOSTILE])
    seen.wait_for_points(5)
    assert seen.page.locator("#volunteers th").all_inner_texts() == ["Asha", HOSTILE]
    assert seen.page.locator("img").count() == 0
    assert seen.page.locator("#rounds .failed").all_inner_texts() == [
        f"Round 4 failed at first ({HOSTILE}) and was tried again: 2 volunteers, 260 samples, loss 8.99"
    ]
    for empty in ["#no-rounds", "#no-volunteers"]:
        sync_api.expect(seen.page.locator(empty)).to_be_hidden()

    run.status = make_status(5, ["Mitu"])
    seen.wait_for_field("volunteers", "1")
    assert seen.page.locator("#volunteers th").all_inner_texts() == ["Mitu"]
    assert seen.errors == []


def test_script_and_server_say_the_same(browser: "sync_api.Browser", run: Run) -> None:
    live = visit(browser, run)
    live.wait_for_points(30)
    run.status = make_status(45, ["Asha", "রফিক"])
    live.wait_for_field("round", "45")
    live.wait_for_field("computing", "98.9 %")
    still = visit(browser, run, java_script_enabled=False)
    run.status = run.status.model_copy(update={"samples_in_round": 352})
    live.wait_for_field("next", "now")
    averaging = visit(browser, run, java_script_enabled=False)
    assert live.page.locator(".progress").inner_text() == averaging.page.locator(".progress").inner_text()
    run.status = make_status(45, ["Asha", "রফিক"])
    live.wait_for_field("next", "1 min 46 s")
    for place in ["#state", ".figures", ".progress", "[data-field=heldout-sentence]", "#helping", "#rounds"]:
        assert live.page.locator(place).inner_text() == still.page.locator(place).inner_text(), place
    for annealed in (0.345, 1.0):
        run.status = run.status.model_copy(update={"annealed": annealed})
        still = visit(browser, run, java_script_enabled=False)
        sync_api.expect(live.page.locator("#state")).to_have_text(still.page.locator("#state").inner_text())


def test_a_lost_coordinator_is_said_and_found_again(browser: "sync_api.Browser", run: Run) -> None:
    seen = visit(browser, run)
    state = seen.page.locator("#state")
    sync_api.expect(state).to_have_text("Round 31 is under way with 3 volunteers.")
    seen.page.route("**/api/v1/status", lambda route: route.abort())
    sync_api.expect(state).to_have_text("Connection lost, trying again…")
    seen.page.unroute("**/api/v1/status")
    sync_api.expect(state).to_have_text("Round 31 is under way with 3 volunteers.")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_scrolls_only_downwards(browser: "sync_api.Browser", run: Run, scheme: str) -> None:
    run.status = make_status(30, ["Asha", "x" * 80, "রফিক"])
    seen = visit(browser, run, viewport={"width": 360, "height": 740}, color_scheme=scheme)
    seen.wait_for_points(30)
    assert seen.page.evaluate("document.documentElement.scrollWidth") == 360
    explanation = seen.page.locator(".explanation p").first
    assert not explanation.is_visible()
    seen.page.locator("summary").first.click()
    assert explanation.is_visible()
    assert seen.errors == []
