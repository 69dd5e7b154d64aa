"""The run's page in a real Chromium: live, quiet in the console, and talking to nobody but its own server."""

import shutil
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import uvicorn
from chromium import CHROMIUM, CHROMIUM_ARGUMENTS, MARKS
from made_up import MadeUpRun, make_blanks, make_volunteer

from kantha.coordinator.rundir import RunDirectory
from kantha.spec import EvaluationSpec, ScheduleSpec

sync_api = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")

HOSTILE = "<img src=x onerror=alert(1)>"
PATIENCE = 30_000  # milliseconds
sync_api.expect.set_options(timeout=PATIENCE)

pytestmark = MARKS


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

    def wait_for_figure(self, name: str, text: str) -> None:
        sync_api.expect(self.page.locator(f"#figure-{name}")).to_have_text(text)

    def shown_rounds(self) -> list[float]:
        """From and to."""
        return list(
            self.page.evaluate(
                "() => (({ start, end }) => [start, end])(Bokeh.documents[0].get_model_by_name('shown'))"
            )
        )

    def curves(self) -> set[str]:
        """Names of those that are drawn."""
        shown = "() => Bokeh.documents[0].get_model_by_name('loss').renderers.filter(r => r.visible).map(r => r.name)"
        return set(self.page.evaluate(shown))


@pytest.fixture(scope="module")
def _served(tiny_run: RunDirectory, tmp_path_factory: pytest.TempPathFactory) -> Iterator[MadeUpRun]:
    directory = RunDirectory.open(Path(shutil.copytree(tiny_run.path, tmp_path_factory.mktemp("page") / "run")))
    directory.spec = directory.spec.model_copy(
        update={
            "schedule": ScheduleSpec(goal_samples=1_000_000),
            "evaluation": EvaluationSpec(sentences=("আমি প্রতিদিন ভাত ___।", "আকাশের রং ___।")),
        }
    )
    with socket.create_server(("127.0.0.1", 0)) as listener:
        run = MadeUpRun(directory, address=f"http://127.0.0.1:{listener.getsockname()[1]}")
        server = uvicorn.Server(uvicorn.Config(run.app, log_level="warning"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        yield run
        server.should_exit = True
        thread.join()


@pytest.fixture
def run(_served: MadeUpRun) -> MadeUpRun:
    _served.volunteers = ["Asha", "Mitu", "রফিক"]
    _served.begin(30, failed=[4])
    return _served


@pytest.fixture(scope="module")
def browser() -> Iterator["sync_api.Browser"]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=CHROMIUM_ARGUMENTS)
        yield browser
        browser.close()


def visit(browser: "sync_api.Browser", run: MadeUpRun, path: str = "", **options: object) -> Visit:
    context = browser.new_context(**{"locale": "en-GB", **options})
    visit = Visit(context.new_page())
    # A violated Content-Security-Policy is an error in the console, too.
    visit.page.on("console", lambda message: visit.errors.append(message.text) if message.type == "error" else None)
    visit.page.on("pageerror", lambda error: visit.errors.append(str(error)))
    context.on("request", lambda request: visit.requests.append(request.url))
    visit.page.goto(f"{run.address}/{path}")
    return visit


def test_the_page_lives_without_a_reload(browser: "sync_api.Browser", run: MadeUpRun) -> None:
    seen = visit(browser, run)
    seen.wait_for_points(30)
    assert seen.page.locator("#helping tbody th").all_inner_texts() == ["Asha", "Mitu", "রফিক"]
    painted = """canvases => canvases.filter(canvas => {
        const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
        return data.some(value => value > 0);
    }).length"""
    assert seen.page.locator(".chart canvas").evaluate_all(painted) >= 5
    seen.page.evaluate("window.notReloaded = true")
    seen.page.locator("summary").first.click()

    run.volunteers = ["Asha", "Nila"]
    run.ledger.filled = [make_blanks(0, "করা", "করা"), make_blanks(30, "খাই", "নীল")]
    run.go_on(31)
    seen.wait_for_points(31)
    seen.wait_for_points(7, "heldout")
    seen.wait_for_figure("round", "31")
    first = seen.page.locator("#rounds li").first
    sync_api.expect(first).to_have_text("Round 31: 3 volunteers, 291 samples, 40 s, loss 8.66")
    sync_api.expect(seen.page.locator("#helping tbody th")).to_have_text(["Asha", "Nila"])
    sync_api.expect(seen.page.locator("#sayings mark")).to_have_text(["খাই", "নীল"])
    assert seen.page.locator(".explanation p").first.is_visible()  # a reader is not interrupted

    columns = "name => [...Bokeh.documents[0].get_model_by_name('rounds').data[name]]"
    assert seen.page.evaluate(columns, "loss_smooth") == pytest.approx(seen.page.evaluate(columns, "loss"), abs=0.01)

    assert seen.page.evaluate("window.notReloaded")
    assert seen.errors == []
    assert {url for url in seen.requests if not url.startswith(f"{run.address}/")} == set()
    news = [url for url in seen.requests if "chart-data" in url]
    assert len(news) >= 2
    assert all("after=" in url for url in news[1:])
    assert [url for url in seen.requests if url == f"{run.address}/"] == [f"{run.address}/"]


def test_readers_choose_curves_and_scale_and_rounds_by_keyboard(browser: "sync_api.Browser", run: MadeUpRun) -> None:
    seen = visit(browser, run)
    seen.wait_for_points(30)
    page = seen.page
    assert seen.curves() == {"total", "total raw", "total heldout"}
    for curve in ["hidden words", "total"]:
        page.get_by_label(curve, exact=True).press("Space")
    assert seen.curves() == {"words", "words raw", "words heldout"}
    page.get_by_label("held-out text").press("Space")
    page.get_by_label("each round").press("Space")
    page.get_by_label("sentence order").press("Space")
    assert seen.curves() == {"words", "order"}

    low, high = page.evaluate(
        "() => (({ start, end }) => [start, end])(Bokeh.documents[0].get_model_by_name('loss').y_range)"
    )
    assert low < 0.69 < 7.999 < high
    page.get_by_label("linear").press("ArrowRight")
    scale = "() => Bokeh.documents[0].get_model_by_name('loss').y_scale.type"
    assert page.evaluate(scale) == "LogScale"
    low, high = page.evaluate(
        "() => (({ start, end }) => [start, end])(Bokeh.documents[0].get_model_by_name('loss').y_range)"
    )
    assert 0 < low < 0.69 < 7.999 < high

    whole = seen.shown_rounds()
    page.get_by_role("button", name="Closer").press("Enter")
    start, end = seen.shown_rounds()
    assert whole[0] < start < end == whole[1]
    run.go_on(31)
    seen.wait_for_points(31)
    assert seen.shown_rounds() == [start, end]  # what a reader has chosen stays
    page.get_by_role("button", name="All rounds").press("Enter")
    assert seen.shown_rounds()[1] > whole[1]
    assert seen.errors == []


def test_readers_zoom_by_dragging_and_by_the_wheel_with_ctrl(browser: "sync_api.Browser", run: MadeUpRun) -> None:
    seen = visit(browser, run)
    seen.wait_for_points(30)
    page = seen.page
    chart = page.locator("#chart-speed")
    chart.scroll_into_view_if_needed()
    box = chart.bounding_box()
    whole = seen.shown_rounds()

    def drag(start: float, end: float) -> None:
        page.mouse.move(box["x"] + start * box["width"], box["y"] + box["height"] / 2)
        page.mouse.down()
        page.mouse.move(box["x"] + end * box["width"], box["y"] + box["height"] / 2, steps=5)
        page.mouse.up()

    changed = """before => {
        const { start, end } = Bokeh.documents[0].get_model_by_name("shown");
        return start !== before[0] || end !== before[1];
    }"""
    drag(0.4, 0.7)
    page.wait_for_function(changed, arg=whole, timeout=PATIENCE)
    part = seen.shown_rounds()
    assert whole[0] < part[0] < part[1] < whole[1]
    page.get_by_label("moves the curve").check()
    chart.scroll_into_view_if_needed()
    drag(0.4, 0.5)
    page.wait_for_function(changed, arg=part, timeout=PATIENCE)
    moved = seen.shown_rounds()
    assert moved[0] < part[0]
    assert moved[1] - moved[0] == pytest.approx(part[1] - part[0])
    page.keyboard.down("Control")
    page.mouse.wheel(0, 300)
    page.wait_for_function(changed, arg=moved, timeout=PATIENCE)
    page.keyboard.up("Control")
    wide = seen.shown_rounds()
    assert wide[1] - wide[0] > moved[1] - moved[0]
    above = page.evaluate("() => scrollY")
    page.mouse.wheel(0, -100)  # without Ctrl it scrolls the page
    page.wait_for_function("above => scrollY < above", arg=above, timeout=PATIENCE)
    assert seen.shown_rounds() == wide
    assert seen.errors == []


def test_charts_speak_bengali(browser: "sync_api.Browser", run: MadeUpRun) -> None:
    run.begin(1_300)
    seen = visit(browser, run, locale="bn-BD")
    seen.wait_for_points(1_000)
    assert seen.page.locator("html").get_attribute("lang") == "bn"
    texts = seen.page.evaluate(
        """() => {
            const plot = Bokeh.documents[0].get_model_by_name("loss");
            const data = Bokeh.documents[0].get_model_by_name("rounds").data;
            return [...plot.below[0].formatter.doFormat([0, 1300, 2.5]), data.round_text.at(-1), data.loss_text.at(-1)];
        }"""
    )
    assert texts == ["০", "১,৩০০", "২.৫", "১,৩০০", "৭.৩৯"]
    assert seen.errors == []


def test_an_empty_run_fills(browser: "sync_api.Browser", run: MadeUpRun) -> None:
    run.volunteers = []
    run.begin(0)
    seen = visit(browser, run)
    sync_api.expect(seen.page.get_by_text("The first round is on its way: 64 of 256 samples.")).to_be_visible()
    sync_api.expect(seen.page.get_by_text("Be the first")).to_be_visible()
    assert not seen.page.locator("#charts").is_visible()

    run.go_on(5, failed=[4], volunteers=[make_volunteer("Asha"), make_volunteer(HOSTILE)])
    run.ledger.rounds[3] = run.ledger.rounds[3].model_copy(update={"reason": HOSTILE})
    seen.wait_for_points(5)
    sync_api.expect(seen.page.locator("#helping tbody th")).to_have_text(["Asha", HOSTILE])
    assert seen.page.locator("img").count() == 0
    failed = f"Round 4 failed at first ({HOSTILE}) and was tried again: 3 volunteers, 264 samples, 40 s, loss 8.69"
    sync_api.expect(seen.page.locator("#rounds .failed")).to_have_text([failed])
    for empty in ["The first round is on its way", "Be the first"]:
        sync_api.expect(seen.page.get_by_text(empty)).to_be_hidden()
    assert seen.errors == []


def test_a_swarm_that_began_anew_is_drawn_anew(browser: "sync_api.Browser", run: MadeUpRun) -> None:
    seen = visit(browser, run)
    seen.wait_for_points(30)
    run.go_on(12)
    seen.wait_for_points(12)
    seen.wait_for_points(3, "heldout")
    run.go_on(14)
    seen.wait_for_points(14)


def test_a_lost_coordinator_is_said_and_found_again(browser: "sync_api.Browser", run: MadeUpRun) -> None:
    seen = visit(browser, run)
    lost = seen.page.get_by_text("Connection lost, trying again…")
    sync_api.expect(lost).to_be_hidden()
    seen.page.route("**/*", lambda route: route.abort())
    sync_api.expect(lost).to_be_visible()
    seen.page.unroute("**/*")
    sync_api.expect(lost).to_be_hidden()
    run.go_on(31)
    seen.wait_for_points(31)


@pytest.mark.parametrize("path", ["", "join"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_scrolls_only_downwards(browser: "sync_api.Browser", run: MadeUpRun, scheme: str, path: str) -> None:
    run.volunteers = ["Asha", "x" * 80, "রফিক"]
    run.ledger.filled = [make_blanks(0, "করা", "করা"), make_blanks(25, "খাই", "নীল" * 20)]
    options = {"viewport": {"width": 360, "height": 740}, "color_scheme": scheme, "has_touch": True, "is_mobile": True}
    seen = visit(browser, run, path, **options)
    if not path:
        seen.wait_for_points(30)
        assert seen.page.get_by_label("does nothing").is_checked()  # a finger on a chart scrolls the page
        explanation = seen.page.locator(".explanation p").first
        assert not explanation.is_visible()
        seen.page.locator("summary").first.tap()
        assert explanation.is_visible()
    assert seen.page.evaluate("document.documentElement.scrollWidth") == 360
    assert seen.errors == []


def test_the_command_is_copied(browser: "sync_api.Browser", run: MadeUpRun) -> None:
    seen = visit(browser, run, "join", permissions=["clipboard-read", "clipboard-write"])
    button = seen.page.get_by_role("button", name="Copy")
    button.click()
    sync_api.expect(seen.page.get_by_role("button", name="Copied")).to_be_visible()
    assert seen.page.evaluate("navigator.clipboard.readText()") == f"kantha join {run.address} --name YOUR-NAME"
