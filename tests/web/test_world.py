"""Metrics, exports, badges, the feed, and the API's own page, of a run whose ledger the test fills."""

import csv
import io
import json
import xml.etree.ElementTree as ET
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from prometheus_client.parser import text_string_to_metric_families

from kantha.coordinator.allowlist import Person
from kantha.coordinator.limiter import EXPORTS
from kantha.coordinator.service import Coordinator
from kantha.coordinator.status import HeldoutStatus
from kantha.errors import StorageError
from kantha.spec import ScheduleState
from kantha.swarm.membership import Membership
from kantha.swarm.reports import RoundReport

ADDRESS = "http://127.0.0.1:8600"
ATOM = "{http://www.w3.org/2005/Atom}"
ROUNDS = 45


@pytest.fixture
def client(web_app: FastAPI, web_coordinator: Coordinator) -> TestClient:
    web_app.state.site._kept.clear()
    return TestClient(web_app, base_url=ADDRESS, client=("127.0.0.1", 1234))


@pytest.fixture
def filled(web_coordinator: Coordinator) -> Coordinator:
    """Two people and one whom nobody knows any more; round N has 10 N samples of the first."""
    ledger = web_coordinator.ledger
    for name, peer in (("Asha", "peer 1"), ("=রফিক", "peer 2"), ("Gone", "peer 3")):
        web_coordinator.allowlist.sign_in(Person(name, "", "local", ()))
        number = web_coordinator.allowlist.standing(name).number
        member = Membership(
            serial="0f" * 8,
            run=web_coordinator.run.spec.fingerprint,
            username=name,
            peer_id=peer,
            service="local",
            roles=("trainer",),
            issued=0,
            expires=2**31,
        )
        ledger.add_member(member, None if name == "Gone" else number)
    ledger.add_rounds("peer 1", [_report(number, 10 * number) for number in range(1, ROUNDS + 1)])
    ledger.add_rounds("peer 2", [_report(1, 7)])
    ledger.add_rounds("peer 3", [_report(2, 5)])
    ledger.mark_failed(2, "a peer stalled")
    ledger.add_heldout(
        HeldoutStatus(
            round=0,
            loss=8.75,
            mlm_loss=8.0,
            mlm_accuracy=0.25,
            sop_loss=0.75,
            sop_accuracy=0.5,
            masked=100,
            pairs=10,
        )
    )
    web_coordinator._status = None  # type: ignore[attr-defined]
    return web_coordinator


SAMPLES = 10 * ROUNDS * (ROUNDS + 1) // 2 + 7 + 5


def _report(number: int, samples: int) -> RoundReport:
    return RoundReport(
        round=number,
        lineage="0f",
        samples=samples,
        seconds=2.0,
        waited=1.0,
        mlm_loss_sum=samples * 6.0,
        sop_loss_sum=samples * 0.5,
        peers=1,
    )


def metrics_of(client: TestClient) -> dict[tuple[str, ...], float]:
    answer = client.get("/metrics")
    assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    return {
        (sample.name, *(value for _, value in sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
    }


def test_metrics_are_the_ledger_s_figures(client: TestClient, filled: Coordinator) -> None:
    found = metrics_of(client)
    assert found["kantha_samples_total",] == SAMPLES
    assert found["kantha_rounds_total",] == ROUNDS
    assert found["kantha_failed_rounds_total",] == 1
    assert found["kantha_computing_seconds_total",] == 2.0 * (ROUNDS + 2)
    assert found["kantha_people",] == 3
    assert found["kantha_volunteers",] == 0
    assert found["kantha_learning_rate",] == 0.01
    assert found["kantha_loss", "both", "training"] == pytest.approx(6.5)
    assert found["kantha_loss", "masked tokens", "heldout"] == 8.0
    assert found["kantha_paused",] == found["kantha_problem",] == 0
    assert found["process_resident_memory_bytes",] > 0
    [run] = [labels for name, *labels in found if name == "kantha_run_info"]
    assert filled.run.spec.fingerprint in run


def test_metrics_before_the_first_round(client: TestClient) -> None:
    found = metrics_of(client)
    assert found["kantha_samples_total",] == 0
    assert not any(name == "kantha_loss" for name, *_ in found)


@pytest.mark.parametrize(
    "accept", ["application/openmetrics-text; version=zz", "text/plain;version=9;escaping=\t", "*"]
)
def test_whatever_is_asked_for_metrics_are_answered(client: TestClient, accept: str) -> None:
    answer = client.get("/metrics", headers={"Accept": accept})
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")


def rows_of(client: TestClient, table: str) -> list[dict[str, Any]]:
    """Of the JSON, which says the same as the CSV."""
    found = client.get(f"/api/v1/export/{table}.json")
    assert found.headers["content-type"] == "application/json"
    rows = json.loads(found.content)
    sheet = client.get(f"/api/v1/export/{table}.csv")
    assert sheet.headers["content-type"] == "text/csv; charset=utf-8"
    assert f'filename="{table}.csv"' in sheet.headers["content-disposition"]
    cells = list(csv.DictReader(io.StringIO(sheet.text)))
    for row, line in zip(rows, cells, strict=True):
        for name, value in row.items():
            assert line[name].removeprefix("'") == ("" if value is None else str(value))
    return rows


def test_all_rounds_are_exported_and_add_up(client: TestClient, filled: Coordinator) -> None:
    many = 1_203  # more than is read at once
    filled.ledger.add_rounds("peer 2", [_report(number, 1) for number in range(ROUNDS + 1, many + 1)])
    rows = rows_of(client, "rounds")
    assert [row["round"] for row in rows] == list(range(1, many + 1))
    assert sum(row["samples"] for row in rows) == SAMPLES + many - ROUNDS == filled.ledger.totals().samples
    assert [row["round"] for row in rows if row["failed"]] == [2]
    assert rows[0]["loss"] == pytest.approx(6.5)


def test_people_are_exported_as_they_want_to_be_named_and_add_up(
    client: TestClient, filled: Coordinator, monkeypatch: pytest.MonkeyPatch
) -> None:
    asha, rafiq = (filled.allowlist.standing(name).number for name in ("Asha", "=রফিক"))
    monkeypatch.setattr(filled.allowlist, "shown", lambda: {rafiq: "=রফিক"})
    rows = rows_of(client, "volunteers")
    assert [(row["number"], row["name"], row["people"], row["samples"]) for row in rows] == [
        (rafiq, "=রফিক", 1, 7),
        (None, None, 2, SAMPLES - 7),
    ]
    assert "Asha" not in client.get("/api/v1/export/volunteers.csv").text
    assert "'=রফিক" in client.get("/api/v1/export/volunteers.csv").text  # a spreadsheet would compute it
    monkeypatch.setattr(filled.allowlist, "shown", lambda: {asha: "Asha", rafiq: "R"})
    assert [row["name"] for row in rows_of(client, "volunteers")] == ["Asha", "R", None]


@pytest.mark.parametrize("table", ["rounds", "volunteers"])
def test_nothing_is_exported_of_a_run_that_has_just_begun(client: TestClient, table: str) -> None:
    assert rows_of(client, table) == []


def test_a_loss_that_is_no_number_is_null(client: TestClient, filled: Coordinator) -> None:
    row = _report(ROUNDS + 1, 5).copy(update={"mlm_loss_sum": 1.7e308 * 10})
    filled.ledger.add_rounds("peer 1", [row])
    assert rows_of(client, "rounds")[-1]["loss"] is None


def test_a_ledger_that_cannot_be_read_is_said(
    client: TestClient, filled: Coordinator, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse() -> Any:
        raise StorageError("ledger.sqlite: the ledger cannot be used; make room on that disk")

    monkeypatch.setattr(filled.ledger.database, "reading", refuse)
    for path in ("/api/v1/export/rounds.csv", "/api/v1/export/volunteers.json", "/api/v1/milestones", "/feed.atom"):
        answer = client.get(path)
        assert answer.status_code == 503
        assert "make room" in answer.json()["detail"]


def test_exports_are_made_so_often_for_one_address_elsewhere(client: TestClient) -> None:
    stranger = TestClient(client.app, base_url=ADDRESS, client=("203.0.113.5", 1234))
    answers = [stranger.get("/api/v1/export/rounds.csv").status_code for _ in range(EXPORTS.amount + 1)]
    assert answers == [200] * EXPORTS.amount + [429]
    refused = stranger.get("/api/v1/export/volunteers.json")
    assert refused.status_code == 429
    through_a_proxy = client.get("/api/v1/export/volunteers.json", headers={"X-Forwarded-For": "203.0.113.5"})
    assert through_a_proxy.status_code == 200  # another address, and not this machine's: counted by itself
    assert client.get("/api/v1/export/volunteers.json").status_code == 200
    assert int(refused.headers["Retry-After"]) >= 1


# ---- badges


@pytest.mark.parametrize(
    ("name", "title", "in_bengali"),
    [
        ("samples", f"samples: {SAMPLES:,}", "১০,৩৬২"),
        ("volunteers", "volunteers: 3, 0 now", "৩"),
        ("loss", "loss: 8.75", "৮.৭৫"),
        ("round", "rounds: 0", "০"),
    ],
)
def test_a_badge_says_its_figure_also_to_who_hears_it(
    client: TestClient, filled: Coordinator, name: str, title: str, in_bengali: str
) -> None:
    answer = client.get(f"/badge/{name}.svg")
    assert answer.headers["content-type"] == "image/svg+xml"
    assert answer.headers["cache-control"] == "public, max-age=300"
    assert answer.headers["cross-origin-resource-policy"] == "cross-origin"
    badge = ET.fromstring(answer.content)
    assert badge.attrib["role"] == "img"
    assert badge.attrib["aria-label"] == title
    assert badge[0].text == title
    assert in_bengali in client.get(f"/badge/{name}.svg", headers={"Accept-Language": "bn"}).text


@pytest.mark.parametrize("name", ["loss", "samples", "volunteers", "round"])
def test_a_badge_before_the_first_round(client: TestClient, name: str) -> None:
    assert ET.fromstring(client.get(f"/badge/{name}.svg").content).attrib["aria-label"]


@pytest.mark.parametrize("name", ["nothing", "", "samples.svg", "%2e%2e", "<svg>"])
def test_there_is_no_other_badge(client: TestClient, name: str) -> None:
    assert client.get(f"/badge/{name}.svg").status_code in (404, 422)


# ---- milestones


@pytest.fixture
def reached(filled: Coordinator) -> Coordinator:
    filled.milestones.look(ScheduleState())
    return filled


def test_milestones_are_on_a_page_in_a_feed_and_in_the_api(client: TestClient, reached: Coordinator) -> None:
    found = client.get("/api/v1/milestones").json()
    assert {each["key"] for each in found} == {"round 1", "samples 1000", "samples 10000"}
    assert [each["time"] for each in found] == sorted((each["time"] for each in found), reverse=True)
    sentence = "The model has seen 10,000 samples."
    [one] = [each for each in found if each["key"] == "samples 10000"]
    assert (one["sentence"], one["number"], one["kind"]) == (sentence, 10_000, "samples")
    assert one["round"] == next(n for n in range(1, ROUNDS + 1) if 12 + 5 * n * (n + 1) >= 10_000)
    assert sentence in client.get("/milestones").text


def test_the_feed_is_what_feed_readers_want(client: TestClient, reached: Coordinator) -> None:
    answer = client.get("/feed.atom")
    assert answer.headers["content-type"] == "application/atom+xml"
    feed = ET.fromstring(answer.content)  # RFC 4287, section 4.1
    assert feed.tag == f"{ATOM}feed"
    for name in ("id", "title", "updated", "author"):
        assert len(feed.findall(f"{ATOM}{name}")) == 1
    assert feed.find(f"{ATOM}author/{ATOM}name") is not None
    links = {link.attrib["rel"]: link.attrib["href"] for link in feed.findall(f"{ATOM}link")}
    assert links == {"self": f"{ADDRESS}/feed.atom", "alternate": f"{ADDRESS}/milestones"}
    entries = feed.findall(f"{ATOM}entry")
    assert len(entries) == 3
    ids = [entry.findtext(f"{ATOM}id") for entry in entries]
    assert len(set(ids)) == 3
    assert all(each and each.startswith("urn:uuid:") for each in ids)
    updated = [entry.findtext(f"{ATOM}updated") or "" for entry in entries]
    assert updated[0] == feed.findtext(f"{ATOM}updated")
    assert updated == sorted(updated, reverse=True)
    again = ET.fromstring(client.get("/feed.atom", headers={"Accept-Language": "bn"}).content)
    assert [entry.findtext(f"{ATOM}id") for entry in again.findall(f"{ATOM}entry")] == ids


def test_a_feed_of_nothing_is_one(client: TestClient) -> None:
    feed = ET.fromstring(client.get("/feed.atom").content)
    assert feed.findtext(f"{ATOM}updated") == "1970-01-01T00:00:00+00:00"
    assert "Nothing yet" in client.get("/milestones").text


def test_what_the_milestones_page_leads_to_is_there(client: TestClient, reached: Coordinator) -> None:
    page = client.get("/milestones")
    for path in ("feed.atom", "api/docs", "metrics", "badge/loss.svg", "api/v1/export/volunteers.json"):
        assert f'"{path}"' in page.text
        assert client.get(f"/{path}").status_code == 200


# ---- the API's own page


def test_every_endpoint_and_field_is_explained(web_app: FastAPI) -> None:
    schema = web_app.openapi()
    silent = []
    for path, operations in schema["paths"].items():
        for method, operation in operations.items():
            silent += [f"{method} {path}"] if not operation.get("description") else []
            silent += [
                f"{path} {each['name']}" for each in operation.get("parameters", []) if "description" not in each
            ]
    for name, model in schema["components"]["schemas"].items():
        if name in ("HTTPValidationError", "ValidationError"):
            continue  # FastAPI's own
        silent += [name] if not model.get("description") else []
        silent += [
            f"{name}.{field}"
            for field, value in model.get("properties", {}).items()
            if not {"description", "$ref"} & value.keys()
        ]
    assert silent == []


def test_the_page_of_the_api_has_all_of_the_schema_and_needs_no_script(client: TestClient, web_app: FastAPI) -> None:
    text = client.get("/api/docs").text
    assert "<script" not in text
    schema = web_app.openapi()
    for path in schema["paths"]:
        assert f" {path}</code>" in text
    for name, model in schema["components"]["schemas"].items():
        assert f'id="model-{name}"' in text
        for field in model.get("properties", {}):
            assert f"<code>{field}</code>" in text
    for link in {part.partition('"')[0] for part in text.split('href="#model-')[1:]}:
        assert f'id="model-{link}"' in text
    assert 'list of <a href="#model-VolunteerStatus">' in text
    assert "number or null" in text


def test_the_schema_is_where_the_page_says(client: TestClient) -> None:
    answer = client.get("/openapi.json")
    assert answer.json()["info"]["title"] == "Kantha coordinator"
    assert 'href="../openapi.json"' in client.get("/api/docs").text
