import re
from html.parser import HTMLParser

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from kantha.coordinator.status import HeldoutStatus, RoundStatus, RunStatus, VolunteerStatus
from kantha.web.pages import (
    CHART_EARLIER_ROUNDS,
    CHART_HELDOUT_ROUNDS,
    CHART_LAST_ROUNDS,
    SHOWN_ROUNDS,
    page_router,
)

FAILED: dict[str, object] = {"failed": True, "reason": "a peer stalled"}


def make_volunteer(name: str, **changes: object) -> VolunteerStatus:
    volunteer = VolunteerStatus(
        name=name,
        peer_id=f"peer of {name}",
        state="training",
        round=12,
        samples_in_round=30,
        samples=1234,
        samples_per_second=5.25,
        loss=6.875,
        device="CPU, 2 cores",
        seconds_since_seen=75,
    )
    return volunteer.model_copy(update=changes)


def make_round(number: int, **changes: object) -> RoundStatus:
    loss = 8 - number / 10
    entry = RoundStatus(
        round=number,
        samples=260 + number,
        loss=loss + 0.69,
        mlm_loss=loss,
        sop_loss=0.69,
        volunteers=3,
        finished=1.7e9 + number,
        failed=False,
    )
    return entry.model_copy(update=changes)


def make_heldout(number: int) -> HeldoutStatus:
    loss = 8.1 - number / 10
    return HeldoutStatus(
        round=number,
        loss=loss + 0.68,
        mlm_loss=loss,
        mlm_accuracy=0.0625 + number / 1000,
        sop_loss=0.68,
        sop_accuracy=0.5175,
        masked=2300,
        pairs=512,
    )


def make_status(**changes: object) -> RunStatus:
    status = RunStatus(
        name="Bengali ALBERT",
        goal="An ALBERT for Bengali, trained by volunteers.",
        fingerprint="0123abcd",
        address="http://127.0.0.1:8080",
        round=12,
        target_batch_size=256,
        samples_in_round=64,
        samples=3198,
        samples_per_second=21.5,
        seconds_to_next_round=8.9,
        failed_rounds=1,
        computing_share=0.9934,
        checkpoint_round=10,
        learning_rate=0.01,
        volunteers=[make_volunteer(name) for name in ["Asha", "Mitu", "রফিক"]],
        heldout=[make_heldout(number) for number in (0, 5, 10)],
        rounds=[make_round(number, **(FAILED if number == 7 else {})) for number in range(1, 13)],
    )
    return status.model_copy(update=changes)


def client_of(status: RunStatus) -> TestClient:
    app = FastAPI()
    app.include_router(page_router(lambda: status))
    return TestClient(app)


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


def test_the_figures_are_in_the_page_without_javascript() -> None:
    texts = Texts(client_of(make_status()).get("/").text).texts
    expected = {
        "Loss now": "7.49",
        "Held-out loss": "7.78",
        "Rounds done": "12",
        "Samples so far": "3,198",
        "Samples per second": "21.5",
        "Volunteers now": "3",
        "Next round in": "9 s",
        "Time computing": "99.3 %",
        "Failed rounds": "1",
        "Newest checkpoint": "round 10",
    }
    assert {label: texts[texts.index(label) + 1] for label in expected} == expected
    right = "7.2 % of the hidden words guessed right, and 51.7 % of the sentence orders"
    assert f"Held-out text at round 10: loss 7.78; {right}." in texts
    assert "Round 13: 64 of 256 samples" in texts
    assert "Round 13 is under way with 3 volunteers." in texts
    assert "kantha join http://127.0.0.1:8080 --name YOUR-NAME" in texts


def test_every_volunteer_has_a_row() -> None:
    texts = Texts(client_of(make_status()).get("/").text).texts
    for name in ["Asha", "Mitu", "রফিক"]:
        row = texts.index(name)
        assert texts[row + 1 : row + 7] == ["training", "1,234", "5.2", "6.88", "CPU, 2 cores", "1 min 15 s ago"]


def test_last_rounds_are_sentences_newest_first() -> None:
    texts = Texts(client_of(make_status()).get("/").text).texts
    sentences = [text for text in texts if re.match(r"Round \d+( failed.*)?: \d+ volunteer", text)]
    assert len(sentences) == SHOWN_ROUNDS
    assert sentences[0] == "Round 12: 3 volunteers, 272 samples, loss 7.49"
    assert sentences[5] == (
        "Round 7 failed at first (a peer stalled) and was tried again: 3 volunteers, 267 samples, loss 7.99"
    )


def test_a_round_may_fail_without_a_reason() -> None:
    status = make_status(rounds=[make_round(1, failed=True, reason="")])
    seen = Texts(client_of(status).get("/").text).texts
    assert "Round 1 failed at first and was tried again: 3 volunteers, 261 samples, loss 8.59" in seen


def test_one_is_singular() -> None:
    status = make_status(volunteers=[make_volunteer("Asha")], rounds=[make_round(1, volunteers=1, samples=1)])
    texts = Texts(client_of(status).get("/").text).texts
    assert "Round 1: 1 volunteer, 1 sample, loss 8.59" in texts
    assert "Round 13 is under way with 1 volunteer." in texts


def test_how_far_the_annealing_is_and_its_end_are_told() -> None:
    texts = Texts(client_of(make_status(annealed=0.345)).get("/").text).texts
    assert "Round 13 is under way with 3 volunteers. The annealing is 34.5 % done." in texts
    texts = Texts(client_of(make_status(annealed=1.0, volunteers=[])).get("/").text).texts
    assert "The run is finished, after 12 rounds: its model is annealed. Thank you!" in texts


def test_hostile_text_stays_text() -> None:
    hostile = "</script><script>alert(1)</script><img src=x onerror=alert(1)>"
    status = make_status(
        name=hostile,
        goal=hostile,
        address=hostile,
        volunteers=[make_volunteer(hostile, state=hostile, device=hostile)],
        rounds=[make_round(1, failed=True, reason=hostile)],
    )
    seen = Texts(client_of(status).get("/").text)
    assert seen.texts.count(hostile) == 5  # name, goal, and the volunteer's name, state and device
    assert any(text.startswith(f"Round 1 failed at first ({hostile})") for text in seen.texts)
    assert "img" not in [tag for tag, _ in seen.tags]
    own_scripts = [attributes for tag, attributes in seen.tags if tag == "script"]
    assert all("src" in attributes or attributes["type"] == "application/json" for attributes in own_scripts)


def test_the_page_allows_nothing_from_elsewhere() -> None:
    client = client_of(make_status())
    page = client.get("/")
    policy = dict(part.split(" ", 1) for part in page.headers["content-security-policy"].split("; "))
    assert policy["default-src"] == "'self'"
    assert policy["script-src"] == "'self'"
    assert policy["frame-ancestors"] == "'none'"
    sources = {source for value in policy.values() for source in value.split()}
    assert sources == {"'self'", "'none'", "'unsafe-inline'"}
    assert [name for name, value in policy.items() if "'unsafe-inline'" in value] == ["style-src"]
    assert page.headers["x-content-type-options"] == "nosniff"
    assert page.headers["referrer-policy"] == "no-referrer"

    for tag, attributes in Texts(page.text).tags:
        assert not any(name.startswith("on") or name == "style" for name in attributes), (tag, attributes)
        for link in [attributes.get("src"), attributes.get("href")]:
            assert link is None or re.match(r"(static|api)/|#", link), (tag, link)


def test_linked_files_exist_and_are_kept_by_the_browser() -> None:
    client = client_of(make_status())
    tags = Texts(client.get("/").text).tags
    files = [a.get("src") or a["href"] for tag, a in tags if tag in ("script", "link") and ("src" in a or "href" in a)]
    assert len(files) == 4
    assert any(re.fullmatch(r"static/bokeh-[\d.]+\.min\.js", file) for file in files)
    for file in files:
        packed = client.get(f"/{file}")
        assert packed.status_code == 200
        assert packed.headers["content-encoding"] == "gzip"
        assert "immutable" in packed.headers["cache-control"]
        plain = client.get(f"/{file}", headers={"Accept-Encoding": "identity"})
        assert "content-encoding" not in plain.headers
        assert plain.content == packed.content


@pytest.mark.parametrize("file", ["pages.py", "bokeh.js", "..%2Fpages.py", "%2Fetc%2Fpasswd"])
def test_nothing_else_is_served(file: str) -> None:
    assert client_of(make_status()).get(f"/static/{file}").status_code == 404


def test_chart_data_has_equally_long_columns() -> None:
    columns = client_of(make_status()).get("/chart-data").json()
    assert set(columns) == {"round", "loss", "mlm_loss", "sop_loss", "samples", "volunteers", "outcome"}
    assert {len(column) for column in columns.values()} == {12}
    assert columns["round"] == list(range(1, 13))
    assert [
        number for number, outcome in zip(columns["round"], columns["outcome"], strict=True) if outcome == "failed"
    ] == [7]


@pytest.mark.parametrize("count", [1, 200, 999, 1000, 1001, 12_345])
def test_a_long_run_has_a_chart_that_stays_small(count: int) -> None:
    failed = {3, count // 2, count - 100}
    rounds = [make_round(number, failed=number in failed) for number in range(1, count + 1)]
    columns = client_of(make_status(rounds=rounds)).get("/chart-data").json()
    shown = columns["round"]
    assert len(shown) == count if count <= 1000 else 500 <= len(shown) <= CHART_EARLIER_ROUNDS + CHART_LAST_ROUNDS
    assert shown == sorted(set(shown))
    assert shown[-200:] == list(range(max(1, count - 199), count + 1))
    marked = {number for number, outcome in zip(shown, columns["outcome"], strict=True) if outcome == "failed"}
    assert marked == {number for number in failed if 1 <= number <= count}


def test_heldout_points_are_in_the_chart_from_the_first_weights_on() -> None:
    columns = client_of(make_status()).get("/heldout-data").json()
    assert columns["round"] == [0, 5, 10]
    assert columns["loss"] == pytest.approx([8.78, 8.28, 7.78])
    assert {len(column) for column in columns.values()} == {3}


@pytest.mark.parametrize("count", [1, 150, 151, 6250])
def test_heldout_points_stay_few_and_end_with_the_last(count: int) -> None:
    status = make_status(heldout=[make_heldout(number) for number in range(count)])
    shown = client_of(status).get("/heldout-data").json()["round"]
    assert CHART_HELDOUT_ROUNDS / 2 <= len(shown) <= CHART_HELDOUT_ROUNDS or len(shown) == count
    assert shown == sorted(set(shown))
    assert shown[-1] == count - 1


@pytest.mark.parametrize(
    ("samples", "progress", "left"), [(255, "255 of 256 samples", "9 s"), (352, "averaging", "now")]
)
def test_more_samples_than_the_target_are_the_averaging(samples: int, progress: str, left: str) -> None:
    texts = Texts(client_of(make_status(samples_in_round=samples)).get("/").text).texts
    assert f"Round 13: {progress}" in texts
    assert texts[texts.index("Next round in") + 1] == left


@pytest.mark.parametrize(
    "unknown", [{"loss": float("nan")}, {"loss": None, "mlm_loss": None, "sop_loss": None}], ids=str
)
def test_a_loss_that_is_no_number_is_said_and_not_drawn(unknown: dict[str, float | None]) -> None:
    client = client_of(make_status(rounds=[make_round(1), make_round(2, **unknown)]))
    assert client.get("/chart-data").json()["round"] == [1]
    assert "Round 2: 3 volunteers, 262 samples, loss –" in Texts(client.get("/").text).texts


def test_before_the_first_round() -> None:
    status = make_status(
        round=0,
        samples=0,
        failed_rounds=0,
        computing_share=None,
        checkpoint_round=0,
        seconds_to_next_round=None,
        heldout=[],
        rounds=[],
        volunteers=[],
    )
    client = client_of(status)
    seen = Texts(client.get("/").text)
    text = " ".join(seen.texts)
    assert "The first round is on its way: 64 of 256 samples ." in text
    assert "Nobody is helping right now. Be the first: kantha join http://127.0.0.1:8080" in text
    assert "Held-out text has not been measured yet." in text
    for label, value in {
        "Loss now": "–",
        "Held-out loss": "–",
        "Next round in": "–",
        "Time computing": "–",
        "Newest checkpoint": "none yet",
    }.items():
        assert seen.texts[seen.texts.index(label) + 1] == value
    hidden = {attributes.get("id") for _, attributes in seen.tags if "hidden" in attributes}
    assert "helping" in hidden
    assert not hidden & {"no-rounds", "no-volunteers"}
    assert client.get("/chart-data").json()["round"] == []
    assert client.get("/heldout-data").json()["round"] == []
