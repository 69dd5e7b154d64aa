"""The leaderboard, the volunteers' pages, certificates, and what people decide about how they are known."""

import json
import re
import time
from collections.abc import Callable
from html import unescape
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from giving import give, on_days

from kantha.coordinator.allowlist import Person, Shown
from kantha.coordinator.certificate import read_certificate
from kantha.coordinator.leases import Stay
from kantha.coordinator.service import Coordinator
from kantha.swarm.identity import PeerIdentity
from kantha.swarm.membership import MembershipRequest, RunKey
from kantha.swarm.reports import RoundReport
from kantha.web import speech

ADDRESS = "http://127.0.0.1:8600"
HOSTILE = "<script>alert(1)</script>"
Kantha = Callable[..., tuple[int, str, str]]  # the fixture


class Browser:
    """Of somebody on the coordinator's own machine, where a name is enough."""

    def __init__(self, app: FastAPI, name: str | None = None) -> None:
        self.client = TestClient(app, base_url=ADDRESS, client=("127.0.0.1", 1234))
        if name is not None:
            found = re.search(r'name="form" value="([^"]+)"', self.client.get("/sign-in?to=me").text)
            assert found is not None
            answer = self.post("sign-in", form=found[1], name=name)
            assert answer.status_code == 303, answer.text

    def get(self, path: str, **options: Any) -> Any:
        return self.client.get(f"/{path}", **options)

    def text(self, path: str) -> str:
        """What people read there."""
        answer = self.get(path)
        assert answer.status_code == 200, answer.text
        return read(answer.text)

    def post(self, path: str, **fields: str) -> Any:
        if "form" not in fields:
            found = re.search(r'name="form" value="([^"]+)"', self.get("me").text)
            assert found is not None
            fields["form"] = found[1]
        return self.client.post(f"/{path}", data=fields, headers={"Origin": ADDRESS}, follow_redirects=False)


def read(page: str) -> str:
    return unescape(re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", page)))


@pytest.fixture
def app(web_app: FastAPI, web_coordinator: Coordinator) -> FastAPI:
    web_app.state.site._kept.clear()  # the application outlives a test
    return web_app


@pytest.fixture
def someone(app: FastAPI) -> Browser:
    return Browser(app)


@pytest.fixture
def asha(app: FastAPI, web_coordinator: Coordinator) -> Browser:
    """Who has given 300 samples in three rounds."""
    gives(web_coordinator, "asha", (0, 100), (1, 150), (2, 50))
    return Browser(app, "asha")


@pytest.fixture
def moderator(app: FastAPI, web_coordinator: Coordinator) -> Browser:
    browser = Browser(app, "mitu")
    web_coordinator.allowlist.set_moderator("mitu", True, "organizer")
    return browser


def gives(coordinator: Coordinator, name: str, *gifts: tuple[float, int]) -> int:
    return give(coordinator.ledger, coordinator.allowlist, name, *gifts)


def number_of(coordinator: Coordinator, name: str) -> int:
    return coordinator.allowlist.profile(name).number


# ---- the board


def test_the_board_shows_who_gave_how_much(someone: Browser, web_coordinator: Coordinator) -> None:
    gives(web_coordinator, "asha", (0, 1000), (40, 500))
    gives(web_coordinator, "rafiq", (0, 1200))
    page = someone.text("volunteers")
    assert "2 people have given 2,700 samples in 3.0 hours of computing." in page
    assert re.search(r"1 asha 1,500 2\.0 1 2 rafiq 1,200 1\.0 1 All together 2,700 3\.0", page)
    today = someone.text("volunteers?window=today&by=hours")
    assert re.search(r"1 rafiq 1,200 1\.0 1 1 asha 1,000 1\.0 1 All together 2,200 2\.0", today)


def test_what_a_machine_reports_is_its_owners(
    app: FastAPI, someone: Browser, web_coordinator: Coordinator, identity: PeerIdentity
) -> None:
    run = web_coordinator.run.spec.fingerprint
    web_coordinator.admission.admit(MembershipRequest.signed(identity, run, username="আশা"))
    report = RoundReport(
        round=1, lineage="x", samples=64, seconds=90.0, waited=1.0, mlm_loss_sum=1.0, sop_loss_sum=1.0, peers=1
    )
    web_coordinator.ledger.add_rounds(identity.peer_id, [report])
    assert "1 আশা 64 0.0 1" in someone.text("volunteers")
    asha = Browser(app, "আশা")
    assert "You: place 1 of 1 with 64 samples" in asha.text("volunteers")
    page = asha.text(f"volunteers/{number_of(web_coordinator, 'আশা')}")
    assert "Of the last day 100.0 %" in page
    assert "0 s on own machine" in page  # a session that has just begun


def test_the_board_has_pages_and_one_finds_oneself(app: FastAPI, web_coordinator: Coordinator) -> None:
    for number in range(52):
        gives(web_coordinator, f"v{number:02}", (0, 1000 - number))
    last = Browser(app, "v51")
    first = last.text("volunteers")
    assert "You: place 52 of 52 with 949 samples and 1.0 hours" in first
    assert "Page 1 of 2" in first
    assert "v49" in first
    assert "v50" not in first
    second = last.text("volunteers?page=2")
    assert "v50" in second
    assert "All together" in second
    assert "All together" not in first
    assert last.text("volunteers?page=99") == second


@pytest.mark.parametrize(
    "query", ["window=<b>", "by=1", "of=%00", "page=0", "team=x", "team=9", "page=x", "window=" + "9" * 5000]
)
def test_nonsense_in_the_address_is_no_way_in(someone: Browser, query: str) -> None:
    answer = someone.get(f"volunteers?{query}")
    assert answer.status_code in (200, 404, 422)
    assert "<b>" not in answer.text


def test_nobody_is_told_of_who_is_hidden(asha: Browser, someone: Browser, web_coordinator: Coordinator) -> None:
    gives(web_coordinator, "rafiq", (0, 10))
    number = number_of(web_coordinator, "asha")
    assert asha.post("me/shown", shown="hidden").status_code == 303
    page = someone.text("volunteers")
    assert "1 more, not shown 300 3.0" in page
    assert "All together 310" in page
    for path in ("volunteers", "volunteers?of=teams", "api/v1/volunteers", "api/v1/status", ""):
        assert "asha" not in someone.get(path).text.casefold()
    for path in (f"volunteers/{number}", f"volunteers/{number}/certificate", f"volunteers/{number}/certificate.json"):
        hidden, missing = someone.get(path), someone.get(path.replace(str(number), "777"))
        assert hidden.status_code == missing.status_code == 404
        assert read(hidden.text) == read(missing.text)  # nor that there is anybody
    assert "Only you see this page" in asha.text(f"volunteers/{number}")
    assert "You are not on this board" in asha.text("volunteers")


def test_the_status_names_people_as_they_choose(asha: Browser, web_coordinator: Coordinator, someone: Browser) -> None:
    number = number_of(web_coordinator, "asha")
    peer = f"machine 0 of {number}"
    web_coordinator.status()
    assert web_coordinator._shown(peer) == ("asha", number)
    for shown, expected in [("nickname", ("Starling", number)), ("hidden", (None, None))]:
        asha.post("me/shown", shown=shown, nickname="Starling")
        web_coordinator._status = None  # kept for a second
        web_coordinator.status()
        assert web_coordinator._shown(peer) == expected


@pytest.mark.parametrize("language", list(speech.LANGUAGES))
def test_what_people_call_themselves_is_text_everywhere(
    app: FastAPI, someone: Browser, web_coordinator: Coordinator, language: str
) -> None:
    coordinator = web_coordinator
    number = gives(coordinator, "asha", (0, 10))
    gives(coordinator, HOSTILE, (0, 20))
    asha = Browser(app, "asha")
    asha.post("me/shown", shown="nickname", nickname='"><img src=x onerror=1>')
    assert asha.post("me/team", action="found", name="</title>&{{7*7}}<svg/onload=1>").status_code == 303
    [team] = coordinator.allowlist.teams()
    pages = ["volunteers", "volunteers?of=teams", f"volunteers?team={team.number}", f"volunteers/{number}", "me"]
    pages += [
        f"volunteers/{each}/certificate{kind}"
        for each in (number, number_of(coordinator, HOSTILE))
        for kind in ("", ".svg")
    ]
    for path in pages:
        answer = asha.get(path, headers={"Accept-Language": language})
        assert answer.status_code == 200, path
        for tag in ("<script>alert", "<img src=x", "<svg/onload", "{{7*7}}<", "&49"):
            assert tag not in answer.text, path
        assert answer.headers["content-security-policy"].startswith("default-src 'self'; object-src 'none'")
        if path.endswith(".svg"):
            assert not [each for each in ElementTree.fromstring(answer.text).iter() if each.tag.endswith("script")]


# ---- a person


def test_a_persons_page_tells_what_was_given(someone: Browser, web_coordinator: Coordinator) -> None:
    number = gives(web_coordinator, "asha", (0, 300), *on_days(1, 2, 30, 31, 32, 33))
    gives(web_coordinator, "rafiq", (0, 100))
    page = someone.text(f"volunteers/{number}")
    for figure in ("Samples 360", "Hours of computing 7.0", "Rounds 7", "Of the last day 75.0 %", "Days in a row 3"):
        assert figure in page
    assert "Most days in a row 4" in page
    assert "own machine" in page
    assert someone.get(f"volunteers/{number}").text.count('class="shade-0"') > 300
    assert "৩৬০" in someone.text(f"volunteers/{number}?lang=bn")


def test_labels_of_machines_are_their_owners_alone(
    asha: Browser, someone: Browser, web_coordinator: Coordinator
) -> None:
    number = number_of(web_coordinator, "asha")
    with web_coordinator.ledger.database.session() as session:
        session.add(Stay(peer_id="p", person=number, service="kaggle", label="kitchen laptop", began=0.0, seen=60.0))
    assert "kitchen laptop" in asha.text(f"volunteers/{number}")
    theirs = someone.text(f"volunteers/{number}")
    assert "1 min 0 s on Kaggle" in theirs
    assert "kitchen laptop" not in theirs


@pytest.mark.parametrize("number", ["0", "-1", "x", "1" * 400, "१", "%00", "1.0"])
def test_other_numbers_are_nobodys(asha: Browser, number: str) -> None:
    assert asha.get(f"volunteers/{number}").status_code == 404


def test_who_asked_to_join_and_gave_nothing_is_no_volunteer(someone: Browser, web_coordinator: Coordinator) -> None:
    standing = web_coordinator.allowlist.sign_in(Person("curious", "", "local", ()))
    assert someone.get(f"volunteers/{standing.number}").status_code == 404


# ---- certificates


@pytest.mark.parametrize("kind", ["json", "svg"])
def test_a_certificate_is_checked_by_anybody(
    asha: Browser, someone: Browser, web_coordinator: Coordinator, kantha: Kantha, tmp_path: Path, kind: str
) -> None:
    number = number_of(web_coordinator, "asha")
    file = tmp_path / f"certificate.{kind}"
    file.write_bytes(someone.get(f"volunteers/{number}/certificate.{kind}").content)
    key = web_coordinator.admission.public_key
    code, out, _ = kantha("verify-certificate", file, "--link", f"{ADDRESS}#{key}")  # nobody answers there: no need to
    assert code == 0
    assert "It holds: asha gave 300 samples in 3 rounds and 3.0 hours of computing to the run “tiny”" in out
    assert "It is signed by the run's key, the one in the link." in out
    code, out, _ = kantha("verify-certificate", file)
    assert code == 0
    assert f"signed by the key {key}" in out
    assert "not proved yet" in out

    forged = file.read_text(encoding="utf-8").replace("asha", "Asha").replace("300", "900")
    file.write_text(forged, encoding="utf-8")
    code, out, error = kantha("verify-certificate", file)
    assert (code, out) == (33, "")
    assert "changed after it was made" in error
    assert len(error.splitlines()) == 1


def test_what_is_drawn_is_what_is_signed(asha: Browser, web_coordinator: Coordinator) -> None:
    number = number_of(web_coordinator, "asha")
    answer = asha.get(f"volunteers/{number}/certificate.svg")
    assert answer.headers["content-type"] == "image/svg+xml"
    certificate = read_certificate(answer.content)
    certificate.check()
    drawn = " ".join(text for each in ElementTree.fromstring(answer.text).iter() for text in [each.text or ""])
    assert certificate.name == "asha"
    for figure in ("asha", "300", "3.0", "tiny"):
        assert figure in drawn
    assert " style=" not in answer.text  # the Content-Security-Policy would drop it
    assert "৩০০" in asha.get(f"volunteers/{number}/certificate.svg?lang=bn").text


@pytest.mark.parametrize("name", ["ক" * 40, "W" * 40, "a b" * 13])
def test_the_longest_names_fit(app: FastAPI, web_coordinator: Coordinator, name: str) -> None:
    number = gives(web_coordinator, name, (0, 1))
    svg = Browser(app).get(f"volunteers/{number}/certificate.svg").text
    found = re.search(r'y="322" font-size="([\d.]+)"', svg)
    assert found is not None
    assert 10 < float(found[1]) * 0.56 * len(name) <= 961


def test_after_a_new_key_the_old_certificate_is_the_runs_by_its_link(
    asha: Browser, web_coordinator: Coordinator, coordinator_url: str, kantha: Kantha, tmp_path: Path
) -> None:
    file = tmp_path / "certificate.json"
    file.write_bytes(asha.get(f"volunteers/{number_of(web_coordinator, 'asha')}/certificate.json").content)
    old = web_coordinator.admission.public_key
    web_coordinator.run.rotate_key()
    web_coordinator.admission.rotate(web_coordinator.run.key(), web_coordinator.run.key_changes())
    new = web_coordinator.admission.public_key
    assert new != old
    code, out, error = kantha("verify-certificate", file, "--link", f"{coordinator_url}#{new}")
    assert (code, error) == (0, "")
    assert "a key that was the run's until" in out
    stranger = RunKey.generate(tmp_path / "stranger.pem").public_key
    code, _, error = kantha("verify-certificate", file, "--link", f"{coordinator_url}#{stranger}")
    assert code in (24, 33)  # nothing leads from that key to the run
    assert len(error.splitlines()) == 1


def test_a_picture_of_a_certificate_proves_nothing(kantha: Kantha, tmp_path: Path) -> None:
    (tmp_path / "c.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    code, _, error = kantha("verify-certificate", tmp_path / "c.png")
    assert code == 33
    assert "proves nothing by itself" in error
    assert kantha("verify-certificate", tmp_path / "missing.svg")[0] == 33


# ---- oneself


def test_a_nickname_a_team_and_back(asha: Browser, someone: Browser, web_coordinator: Coordinator) -> None:
    assert asha.post("me/shown", shown="nickname", nickname="মৌমাছি").headers["location"] == "../me#shown"
    assert asha.post("me/team", action="found", name="Bees").status_code == 303
    assert {"মৌমাছি", "Bees"} <= set(someone.text("volunteers").split())
    rafiq = Browser(asha.client.app, "rafiq")  # type: ignore[arg-type]
    [team] = web_coordinator.allowlist.teams()
    assert "Bees (1)" in rafiq.text("me")
    rafiq.post("me/team", action="join", team=str(team.number))
    assert web_coordinator.allowlist.teams()[0].people == 2
    rafiq.post("me/team", action="leave")
    answer = rafiq.post("me/team", action="found", name="bees!")
    assert answer.status_code == 400
    assert "join that one" in answer.text


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("me/shown", {"shown": "famous"}),
        ("me/shown", {"shown": "nickname", "nickname": "x"}),
        ("me/team", {"action": "join", "team": "99"}),
        ("me/team", {"action": "join", "team": "x"}),
        ("me/team", {"action": "found", "name": ""}),
        ("me/forget", {}),
        ("me/forget", {"sure": "no"}),
    ],
)
def test_what_cannot_be_is_said_and_changes_nothing(
    asha: Browser, web_coordinator: Coordinator, path: str, fields: dict[str, str]
) -> None:
    before = web_coordinator.allowlist.profile("asha")
    answer = asha.post(path, **fields)
    assert answer.status_code == 400
    assert "Nothing was" in answer.text
    assert web_coordinator.allowlist.profile("asha") == before


@pytest.mark.parametrize("path", ["me/shown", "me/team", "me/forget", "volunteers"])
def test_no_other_page_acts_in_ones_name(asha: Browser, web_coordinator: Coordinator, path: str) -> None:
    fields = {"shown": "hidden", "action": "found", "name": "Evil", "sure": "yes"}
    for form in ("", "guess"):
        assert asha.post(path, form=form, **fields).status_code == 403
    found = re.search(r'name="form" value="([^"]+)"', asha.get("me").text)
    assert found is not None
    fields["form"] = found[1]
    elsewhere = asha.client.post(f"/{path}", data=fields, headers={"Origin": "https://evil.example"})
    assert elsewhere.status_code == 403
    profile = web_coordinator.allowlist.profile("asha")
    assert (profile.shown, profile.team) == (Shown.NAME, None)


def test_to_leave_for_good_leaves_the_sums_and_nothing_else(
    asha: Browser, someone: Browser, web_coordinator: Coordinator
) -> None:
    number = number_of(web_coordinator, "asha")
    now = time.time()
    web_coordinator.polls.make("pet", "A pet", "Which one?", now - 60, now + 3600, "the organizer")
    entry = web_coordinator.polls.propose("pet", "a cat", number)
    web_coordinator.polls.vote("pet", entry, number)
    answer = asha.post("me/forget", sure="yes")
    assert answer.status_code == 200
    assert "You are forgotten" in answer.text
    assert "asha" not in answer.text
    assert asha.get("me", follow_redirects=False).status_code == 303  # signed out
    [cat] = web_coordinator.polls.entries("pet")
    assert (cat.text, cat.votes, cat.by) == ("a cat", 0, None)
    page = someone.text("volunteers")
    assert "One person has given 300 samples" in page
    assert "1 more, not shown 300" in page
    assert someone.get(f"volunteers/{number}").status_code == 404
    assert json.loads(someone.get("api/v1/volunteers").text)["total"] == {
        "people": 1,
        "samples": 300,
        "seconds": 10_800.0,
    }


# ---- moderators


def test_moderators_take_rude_names_away(
    asha: Browser, moderator: Browser, someone: Browser, web_coordinator: Coordinator
) -> None:
    number = number_of(web_coordinator, "asha")
    asha.post("me/shown", shown="nickname", nickname="rude word")
    asha.post("me/team", action="found", name="rude words")
    [team] = web_coordinator.allowlist.teams()
    for fields in (
        {"action": "nickname", "number": str(number), "reason": "please not"},
        {"action": "team", "number": str(team.number), "reason": "please not"},
    ):
        assert asha.post("volunteers", **fields).status_code == 403
        assert moderator.post("volunteers", **{**fields, "reason": ""}).status_code == 400
        assert moderator.post("volunteers", **fields).status_code == 303
        assert moderator.post("volunteers", **fields).status_code == 400  # it is gone
    assert web_coordinator.allowlist.teams() == []
    assert "rude" not in someone.text("volunteers")
    assert "Your nickname is gone" in asha.text("me")
