import gzip
import json
import re
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from made_up import MadeUpRun, make_blanks, make_heldout, make_round, make_rounds, make_volunteer

from kantha.coordinator.rundir import RunDirectory
from kantha.spec import EvaluationSpec, ScheduleSpec
from kantha.web import speech
from kantha.web.charts import CURVE_POINTS, HELDOUT_POINTS, LAST_ROUNDS, make_charts
from kantha.web.dashboard import SHOWN_ROUNDS, Progress
from kantha.web.site import load_assets

SENTENCES = ("আমি ভাত ___।", "আকাশের রং ___।")


@pytest.fixture(scope="module")
def run(tiny_run: RunDirectory, tmp_path_factory: pytest.TempPathFactory) -> Iterator[MadeUpRun]:
    directory = RunDirectory.open(Path(shutil.copytree(tiny_run.path, tmp_path_factory.mktemp("dashboard") / "run")))
    directory.spec = directory.spec.model_copy(
        update={
            "schedule": ScheduleSpec(goal_samples=1_000_000),
            "evaluation": EvaluationSpec(sentences=SENTENCES),
        }
    )
    run = MadeUpRun(directory)
    yield run
    run.app.state.site.forget_kept()


class Texts(HTMLParser):
    """The text a reader sees, in order, and all tags."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.texts: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.texts.append(" ".join(data.split()))


def look(run: MadeUpRun, language: str = "en") -> Texts:
    return Texts(run.client().get("/", headers={"Accept-Language": language}).text)


def data_of(client: TestClient, query: str = "") -> dict[str, Any]:
    answer = client.get(f"/chart-data{query}")
    assert answer.status_code == 200, answer.text
    assert answer.headers["cache-control"] == "no-store"
    return dict(answer.json())


# ---- the page


def test_the_figures_are_in_the_page_without_javascript(run: MadeUpRun) -> None:
    run.begin(12, failed=[7])
    texts = look(run).texts
    expected = {
        "Loss now": "8.68",
        "Held-out loss": "8.77",
        "Rounds done": "12",
        "Samples so far": "3,198",
        "Samples in a day": "3,198",
        "Samples per second": "21.5",
        "Volunteers now": "3",
        "Next round in": "9 s",
        "Time computing": "99.3 %",
        "Failed rounds": "1",
        "Learning rate": "0.01",
        "Newest checkpoint": "round 10",
    }
    assert {label: texts[texts.index(label) + 1] for label in expected} == expected
    right = "7.2 % of the hidden words guessed right, and 51.7 % of the sentence orders"
    assert f"Held-out text at round 10: loss 8.77; {right}." in texts
    assert "Round 13: 64 of 256 samples" in texts
    assert "Round 13 is under way with 3 volunteers." in texts


def test_every_figure_and_chart_has_its_sentence(run: MadeUpRun) -> None:
    run.begin(12)
    tags = look(run).tags
    values = [attributes for tag, attributes in tags if tag == "dd" and "value" in (attributes.get("class") or "")]
    charts = [attributes for tag, attributes in tags if tag == "figure"]
    explained = [attributes["title"] for tag, attributes in tags if tag == "summary"]
    assert len(explained) == len(values) + len(charts) == 16
    assert all(sentence and sentence.endswith(".") for sentence in explained)


def test_in_bengali_all_numbers_have_bengali_digits(run: MadeUpRun) -> None:
    run.begin(12)
    html = run.client().get("/?lang=bn").text
    main = html[html.index("<main") : html.index("</main>")]
    seen = Texts(main).texts
    assert "৩,১৯৮" in seen
    named = {"CPU, 2 cores"}  # in a volunteer's own words
    assert [text for text in seen if re.search("[0-9]", text) and text not in named] == []


@pytest.mark.parametrize(
    ("samples", "seconds", "expected"),
    [
        (10, None, "10 of 1,000 samples, which is 1.0 %."),
        (10, 3700, "At this speed the goal is reached in about 1 h 1 min."),
        (999, 40 * 86_400, "At the speed of the last day the goal is reached in about 40 days, on "),
        (1_234, -5, "The goal of 1,000 samples is reached: 1,234 so far."),
    ],
)
def test_the_goal_is_told_with_its_finish(samples: int, seconds: float | None, expected: str) -> None:
    assert expected in Progress(samples, 1_000, seconds).sentence


def test_the_finish_is_reckoned_from_the_last_day_and_from_now_in_a_young_run(run: MadeUpRun) -> None:
    def seconds_left() -> str:
        [goal] = [text for text in look(run).texts if "of 1,000,000 samples" in text]
        return goal

    run.begin(1)  # began an hour ago: 261 samples in an hour are 44 days for a million… of these 160 days
    assert "the goal is reached in about 159 days" in seconds_left()
    run.ledger.rounds = [make_round(1, finished=run.ledger.rounds[0].finished + 3590)]  # ten seconds ago
    run.app.state.site.forget_kept()
    assert "the goal is reached in about 12 h 54 min" in seconds_left()


def test_every_volunteer_has_a_row(run: MadeUpRun) -> None:
    run.begin(12)
    texts = look(run).texts
    for name in ["Asha", "Mitu", "রফিক"]:
        row = texts.index(name)
        assert texts[row + 1 : row + 7] == ["training", "1,234", "5.2", "6.88", "CPU, 2 cores", "1 min 15 s ago"]


def test_last_rounds_are_sentences_newest_first(run: MadeUpRun) -> None:
    run.begin(12, failed=[7])
    sentences = [text for text in look(run).texts if re.match(r"Round \d+( failed.*)?: \d+ volunteer", text)]
    assert len(sentences) == SHOWN_ROUNDS
    assert sentences[0] == "Round 12: 3 volunteers, 272 samples, 40 s, loss 8.68"
    assert sentences[5] == (
        "Round 7 failed at first (a peer stalled) and was tried again: 3 volunteers, 267 samples, 40 s, loss 8.68"
    )


def test_a_round_may_fail_without_a_reason_and_one_is_singular(run: MadeUpRun) -> None:
    rounds = [make_round(1, volunteers=1, samples=1), make_round(2, failed=True, reason="", seconds=None)]
    run.begin(0, rounds=rounds, volunteers=[make_volunteer("Asha")])
    texts = look(run).texts
    assert "Round 1: 1 volunteer, 1 sample, 40 s, loss 8.69" in texts
    assert "Round 2 failed at first and was tried again: 3 volunteers, 262 samples, loss 8.69" in texts
    assert "Round 1 is under way with 1 volunteer." in texts


def test_how_far_the_annealing_is_and_its_end_are_told(run: MadeUpRun) -> None:
    run.begin(12, annealed=0.345)
    assert "Round 13 is under way with 3 volunteers. The annealing is 34.5 % done." in look(run).texts
    run.begin(12, paused="The text is being mended.")
    assert "The run is paused, volunteers wait." in look(run).texts
    run.begin(12, annealed=1.0, volunteers=[])
    assert "The run is finished, after 12 rounds: its model is annealed. Thank you!" in look(run).texts


def test_what_the_model_says_is_told_with_what_it_said_before(run: MadeUpRun) -> None:
    run.begin(12)
    assert {"আমি ভাত", "।"} <= set(look(run).texts)  # nothing is measured: a blank
    run.ledger.filled = [make_blanks(0, "করা", "করা"), make_blanks(5, "যায়", "নদী"), make_blanks(10, "খাই", "নীল")]
    run.app.state.site.forget_kept()
    texts = look(run).texts
    first = texts.index("আমি ভাত")
    now, before = texts[first : first + 7], texts[first + 7 : first + 11]
    assert now == ["আমি ভাত", "খাই", "।", "খাই", "25 %", "ও", "0.1 %"]
    assert before == ["round 0:", "করা", ", round 5:", "যায়"] or before[:2] == ["round 0:", "করা"]
    told = run.client().get("/api/v1/blanks").json()
    assert told["sentences"] == list(SENTENCES)
    assert [entry["round"] for entry in told["rounds"]] == [0, 5, 10]


def test_before_the_first_round(run: MadeUpRun) -> None:
    run.begin(0, volunteers=[], seconds_to_next_round=None)
    seen = look(run)
    text = " ".join(seen.texts)
    assert "The first round is on its way: 64 of 256 samples." in text
    assert "Nobody is helping right now. Be the first." in text
    assert "Held-out text has not been measured yet." in text
    for label, value in {
        "Loss now": "–",
        "Held-out loss": "–",
        "Next round in": "–",
        "Time computing": "–",
        "Newest checkpoint": "none yet",
    }.items():
        assert seen.texts[seen.texts.index(label) + 1] == value
    data = data_of(run.client())
    assert data["whole"]
    assert data["rounds"]["round"] == data["heldout"]["round"] == []


@pytest.mark.parametrize(
    ("samples", "progress", "left"), [(255, "255 of 256 samples", "9 s"), (352, "averaging", "now")]
)
def test_more_samples_than_the_target_are_the_averaging(run: MadeUpRun, samples: int, progress: str, left: str) -> None:
    run.begin(12, samples_in_round=samples)
    texts = look(run).texts
    assert f"Round 13: {progress}" in texts
    assert texts[texts.index("Next round in") + 1] == left


@pytest.mark.parametrize("language", ["en", "bn"])
def test_hostile_text_stays_text(run: MadeUpRun, language: str) -> None:
    hostile = "</script><script>alert(1)</script><img src=x onerror=alert(1)>%(name)s"
    run.begin(
        0,
        volunteers=[make_volunteer(hostile, state=hostile, device=hostile)],
        rounds=[make_round(1, failed=True, reason=hostile)],
    )
    run.ledger.filled = [make_blanks(0, hostile, hostile), make_blanks(1, hostile, hostile)]
    seen = look(run, language)
    assert sum(hostile in text for text in seen.texts) == 3 + 1 + 2 * 3  # a row, a reason, and words
    assert "img" not in [tag for tag, _ in seen.tags]
    assert all("src" in attributes for tag, attributes in seen.tags if tag == "script")


def test_while_the_database_is_away_the_page_shows_what_was_known(run: MadeUpRun) -> None:
    run.begin(12)
    run.ledger.filled = [make_blanks(10, "খাই", "নীল")]
    before, data = look(run).texts, data_of(run.client())
    run.ledger.is_away = True
    run.app.state.site.forget_kept()
    assert look(run).texts == before
    assert data_of(run.client()) == data
    assert run.client().get("/api/v1/blanks").json()["rounds"]


def test_what_lives_is_at_an_address_of_its_own(run: MadeUpRun) -> None:
    run.begin(12, failed=[7])
    run.ledger.filled = [make_blanks(10, "খাই", "নীল")]
    client = run.client()
    page, live = (Texts(client.get(path).text) for path in ("/", "/live"))
    living = [attributes["id"] for _, attributes in page.tags if "data-live" in attributes]
    assert len(living) == len(set(living)) > 15
    assert set(living) <= {attributes.get("id") for _, attributes in live.tags}
    with client.stream("GET", "/live") as answer:
        assert len(b"".join(answer.iter_raw())) < 8_000  # every three seconds, over a phone's connection
    assert "content-security-policy" in answer.headers


# ---- its charts


def test_the_page_allows_nothing_from_elsewhere(run: MadeUpRun) -> None:
    run.begin(12)
    page = run.client().get("/")
    policy = dict(part.split(" ", 1) for part in page.headers["content-security-policy"].split("; "))
    assert policy["default-src"] == policy["script-src"] == "'self'"
    assert [name for name, value in policy.items() if "'unsafe-inline'" in value] == ["style-src"]
    assert {source for value in policy.values() for source in value.split()} == {"'self'", "'none'", "'unsafe-inline'"}
    for tag, attributes in Texts(page.text).tags:
        assert not any(name.startswith("on") or name == "style" for name in attributes), (tag, attributes)


def test_the_first_view_is_small_and_its_numbers_come_before_the_scripts(run: MadeUpRun) -> None:
    run.begin(2_000)
    client = run.client()
    page = client.get("/")
    linked = [
        attributes.get("src") or attributes["href"]
        for tag, attributes in Texts(page.text).tags
        if tag in ("script", "link") and ("src" in attributes or "href" in attributes)
        if attributes.get("rel") != "alternate"  # which no browser loads
    ]
    assert len(linked) == 5
    assert any(re.search(r"/bokeh-[\d.]+\.min\.js$", link) for link in linked)
    sizes = {"/": len(page.content)}
    for path in [*linked, "charts", "chart-data"]:
        with client.stream("GET", f"/{path}") as answer:
            assert answer.headers["content-encoding"] == "gzip", path
            sizes[path] = len(b"".join(answer.iter_raw()))
    assert sum(sizes.values()) <= 500_000, sizes
    for tag, attributes in Texts(page.text).tags:
        if tag == "script":
            assert "defer" in attributes or attributes.get("type") == "module", attributes


def test_the_charts_are_in_the_language_of_their_reader(run: MadeUpRun) -> None:
    charts = run.client().get("/charts").json()
    assert set(charts["items"][0]["roots"].values()) == {
        "chart-loss",
        "chart-speed",
        "chart-volunteers",
        "chart-rate",
        "chart-computing",
    }
    with speech.speaking("bn"):
        assert make_charts()["docs"]["run"]["version"] == charts["docs"]["run"]["version"]


def test_chart_data_has_equally_long_columns(run: MadeUpRun) -> None:
    run.begin(12, failed=[7])
    data = data_of(run.client())
    rounds = data["rounds"]
    assert {len(column) for column in rounds.values()} == {12}
    assert rounds["round"] == list(range(1, 13))
    assert [at for at, failed in zip(rounds["round"], rounds["failed"], strict=True) if failed] == [7]
    assert rounds["speed"][0] == pytest.approx(261 / 40, abs=0.01)
    assert data["heldout"]["round"] == [0, 5, 10]
    assert data["heldout"]["loss"] == pytest.approx([8.78, 8.775, 8.77])


@pytest.mark.parametrize("unknown", [{"loss": float("nan")}, {"loss": None, "mlm_loss": None}], ids=str)
def test_a_loss_that_is_no_number_is_said_and_not_drawn(run: MadeUpRun, unknown: dict[str, float | None]) -> None:
    run.begin(2)
    run.ledger.rounds[1] = make_round(2, **unknown)
    data = data_of(run.client())
    assert data["rounds"]["loss"][1] is None
    assert data["rounds"]["volunteers"] == [3, 3]
    assert "Round 2: 3 volunteers, 262 samples, 40 s, loss –" in look(run).texts


def test_who_has_the_curve_gets_what_is_new(run: MadeUpRun) -> None:
    run.begin(300)
    client = run.client()
    assert data_of(client)["whole"]
    news = data_of(client, "?after=297&measured=290")
    assert not news["whole"]
    assert news["rounds"]["round"] == [298, 299, 300]
    assert news["heldout"]["round"] == [295]
    assert len(client.get("/chart-data?after=292&measured=295").content) < 1_500


@pytest.mark.parametrize("after", [0, 300 - LAST_ROUNDS - 1, 301, 2**53])
def test_who_has_too_little_or_too_much_gets_all(run: MadeUpRun, after: int) -> None:
    run.begin(300)
    assert data_of(run.client(), f"?after={after}")["whole"]


@pytest.mark.parametrize("query", ["?after=-1", "?after=x", f"?after={2**70}", "?after=1&measured=-2"])
def test_a_query_without_sense_is_refused(run: MadeUpRun, query: str) -> None:
    assert run.client().get(f"/chart-data{query}").status_code == 422


@pytest.mark.parametrize("count", [1, 150, 151, 1250])
def test_heldout_points_stay_few_and_end_with_the_last(run: MadeUpRun, count: int) -> None:
    run.begin(5)
    run.ledger.scores = [make_heldout(number) for number in range(count)]
    shown = data_of(run.client())["heldout"]["round"]
    assert HELDOUT_POINTS / 2 <= len(shown) <= HELDOUT_POINTS or len(shown) == count
    assert shown == sorted(set(shown))
    assert shown[-1] == count - 1


def test_a_long_curve_is_compressed_once_for_all(run: MadeUpRun) -> None:
    run.begin(0)
    run.ledger.rounds = make_rounds(2 * CURVE_POINTS)
    run.app.state.site.forget_kept()
    client = run.client()
    with client.stream("GET", "/chart-data") as answer:
        packed = b"".join(answer.iter_raw())
    assert len(json.loads(gzip.decompress(packed))["rounds"]["round"]) == CURVE_POINTS
    plain = client.get("/chart-data", headers={"Accept-Encoding": "identity"})
    assert plain.content == gzip.decompress(packed)


# ---- its files


def test_linked_files_are_kept_by_the_browser(run: MadeUpRun) -> None:
    client = run.client()
    for name in load_assets()[1]:
        packed = client.get(f"/static/{name}")
        assert packed.headers["content-encoding"] == "gzip"
        assert "immutable" in packed.headers["cache-control"]
        plain = client.get(f"/static/{name}", headers={"Accept-Encoding": "identity"})
        assert "content-encoding" not in plain.headers
        assert plain.content == packed.content


@pytest.mark.parametrize("file", ["site.py", "bokeh.js", "..%2Fsite.py", "%2Fetc%2Fpasswd"])
def test_nothing_else_is_served(run: MadeUpRun, file: str) -> None:
    assert run.client().get(f"/static/{file}").status_code == 404
