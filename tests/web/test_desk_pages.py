"""The moderators' desk, but for people (test_people.py): announcements, pause, annealing, polls, places."""

import re
import time
from pathlib import Path

import pytest
from fastapi import FastAPI
from local_browser import LocalBrowser, text_of

from kantha.coordinator.polls import PollState
from kantha.coordinator.service import Coordinator
from kantha.errors import StorageError
from kantha.spec import ScheduleState
from kantha.swarm.identity import PeerIdentity
from kantha.swarm.membership import MembershipRequest, Trust
from kantha.swarm.orders import Order
from kantha.training import Replica

HOSTILE = "<script>alert(1)</script>"


@pytest.fixture
def moderator(web_app: FastAPI, web_coordinator: Coordinator) -> LocalBrowser:
    browser = LocalBrowser(web_app, "Mitu")
    web_coordinator.allowlist.set_moderator("Mitu", True, "organizer")
    return browser


def done(answer: object) -> None:
    assert (answer.status_code, answer.headers["location"]) == (303, "../desk"), answer.text  # type: ignore[attr-defined]


def trust(coordinator: Coordinator) -> Trust:
    """What a volunteer knows after its next renewal."""
    found = Trust(coordinator.run.spec.fingerprint, coordinator.admission.public_key)
    found.take(coordinator.admission.notice())
    return found


def log(coordinator: Coordinator) -> list[tuple[str, str, str]]:
    return [(each.by, each.action, each.reason) for each in coordinator.allowlist.log(3)]


def test_an_announcement_is_on_every_page_and_in_the_notice_until_it_is_ended(
    web_app: FastAPI, web_coordinator: Coordinator, moderator: LocalBrowser
) -> None:
    done(moderator.post("/desk/announce", text="সভা আজ রাতে: https://meet.example.org/a?b=1&c=2.", hours="24"))
    desk = moderator.get("/desk").text
    assert "Announced: every page shows it now" in desk
    link = '<a href="https://meet.example.org/a?b=1&amp;c=2" rel="noopener noreferrer nofollow">'
    assert link in desk
    stranger = LocalBrowser(web_app)
    for path in ("/name", "/polls", "/sign-in"):
        assert link in stranger.get(path).text
    [heard] = trust(web_coordinator).announcements
    assert heard.text.startswith("সভা আজ রাতে")
    done(moderator.post("/desk/end-announcement", id=str(heard.id)))
    assert "meet.example.org" not in stranger.get("/name").text
    assert trust(web_coordinator).announcements == ()
    assert log(web_coordinator)[0][:2] == ("Mitu", "end announcement")


@pytest.mark.parametrize(
    "text",
    [
        HOSTILE,
        'https://a.example/"onmouseover="alert(1)',
        "javascript:alert(1)",
        "http://a.example",
        "https://bank.example@evil.example/",
        "https://[",
        "https://",
    ],
)
def test_an_announcement_is_text_and_only_plain_https_addresses_are_links(
    web_app: FastAPI, web_coordinator: Coordinator, moderator: LocalBrowser, text: str
) -> None:
    done(moderator.post("/desk/announce", text=f"look: {text}", hours="6"))
    page = LocalBrowser(web_app).get("/name").text
    news = page.partition('id="news"')[2].partition("</header>")[0]
    links = re.findall("<a [^>]*>", news)
    assert links in ([], ['<a href="https://a.example/" rel="noopener noreferrer nofollow">'])
    assert "<script" not in news
    assert f"look: {text}" in text_of(LocalBrowser(web_app).get("/name")).replace("a.example/ ", "a.example/")


def test_a_run_is_paused_with_a_reason_everybody_sees_and_resumed(
    web_app: FastAPI, web_coordinator: Coordinator, moderator: LocalBrowser
) -> None:
    assert "takes a reason" in text_of(moderator.post("/desk/pause", reason=""))
    done(moderator.post("/desk/pause", reason="the text is mended"))
    assert trust(web_coordinator).paused == "the text is mended"
    assert "The run is paused: “the text is mended”" in LocalBrowser(web_app).text("/name")
    web_coordinator._status = None  # it is kept for a second
    assert LocalBrowser(web_app).get("/api/v1/status").json()["paused"] == "the text is mended"
    assert moderator.post("/desk/pause", reason="again").status_code == 400
    done(moderator.post("/desk/resume"))
    assert trust(web_coordinator).paused == ""
    assert "is paused" not in LocalBrowser(web_app).text("/name")
    assert log(web_coordinator)[:2] == [("Mitu", "resume", ""), ("Mitu", "pause", "the text is mended")]


def test_annealing_is_ordered_in_two_steps_and_taken_back(
    web_coordinator: Coordinator, moderator: LocalBrowser
) -> None:
    run = web_coordinator.run
    nothing = moderator.post("/desk/anneal", samples="640")
    assert (nothing.status_code, "nothing to anneal" in text_of(nothing)) == (400, True)
    run.save_checkpoint(Replica(run.spec), 5, "after 5", ScheduleState(samples=6_400))
    assert moderator.post("/desk/anneal", samples="many").status_code == 400
    step = moderator.post("/desk/anneal", samples="")
    assert "over 1,600 samples, about 25 rounds" in text_of(step)
    assert run.read_order() is None, "nothing was ordered yet"
    done(moderator.post("/desk/anneal", samples="1600", confirm="yes"))
    assert Order.model_validate_json(run.read_order() or "").anneal_samples == 1_600
    assert "Ordered, over 1,600 samples." in moderator.text("/desk")
    assert moderator.post("/desk/anneal", samples="1", confirm="yes").status_code == 400
    done(moderator.post("/desk/anneal", cancel="yes"))
    assert Order.model_validate_json(run.read_order() or "").anneal_samples == 0
    assert moderator.post("/desk/anneal", cancel="yes").status_code == 400
    assert log(web_coordinator)[:2] == [("Mitu", "cancel annealing", ""), ("Mitu", "anneal", "1,600 samples")]


def test_the_place_of_a_machine_that_hangs_is_freed(
    web_coordinator: Coordinator, moderator: LocalBrowser, identity: PeerIdentity
) -> None:
    request = MembershipRequest.signed(
        identity, web_coordinator.run.spec.fingerprint, username="Asha", service="local", instance=f"laptop {HOSTILE}"
    )
    admitted = web_coordinator.admission.admit(request)
    desk = moderator.get("/desk").text
    assert "laptop &lt;script&gt;" in desk
    assert "<script>alert" not in desk
    done(moderator.post("/desk/end-lease", peer=identity.peer_id))
    assert "The place of Asha is free." in moderator.text("/desk")
    assert web_coordinator.admission.all_leases() == []
    assert trust(web_coordinator).is_revoked(admitted.certificate.membership.serial)  # type: ignore[union-attr]
    assert moderator.post("/desk/end-lease", peer=identity.peer_id).status_code == 400


def at(seconds: float) -> str:
    """As a browser sends a time."""
    return time.strftime("%Y-%m-%dT%H:%M", time.gmtime(time.time() + seconds))


def test_a_poll_is_made_changed_and_closed(web_coordinator: Coordinator, moderator: LocalBrowser) -> None:
    assert 'value="name"' in moderator.get("/desk").text, "the poll for the name is offered first"
    fields = {"slug": "name", "title": "Its name", "question": "Well?", "opens": at(-120), "closes": at(3600)}
    done(moderator.post("/desk/make-poll", **fields))
    assert "“Its name” is set up." in moderator.text("/desk")
    assert "Well?" in moderator.text("/name")
    assert moderator.post("/desk/make-poll", **fields).status_code == 400
    done(moderator.post("/desk/change-poll", **fields | {"title": "The name", "closes": at(7200)}))
    poll = web_coordinator.polls.poll("name")
    assert poll is not None
    assert poll.title == "The name"
    assert abs(poll.closes - time.time() - 7200) <= 60
    done(moderator.post("/desk/close-poll", slug="name"))
    poll = web_coordinator.polls.poll("name")
    assert poll is not None
    assert poll.state == PollState.CLOSED
    final = moderator.post("/desk/change-poll", **fields)
    assert (final.status_code, "its result is final" in text_of(final)) == (400, True)
    assert [action for _, action, _ in log(web_coordinator)] == ["close poll", "change poll", "open poll"]


@pytest.mark.parametrize("change", [{"opens": "tomorrow"}, {"closes": ""}, {"slug": "../x"}, {"title": ""}])
def test_what_can_be_no_poll_is_refused_with_a_reason(
    web_coordinator: Coordinator, moderator: LocalBrowser, change: dict[str, str]
) -> None:
    fields = {"slug": "name", "title": "Its name", "opens": at(0), "closes": at(60)} | change
    answer = moderator.post("/desk/make-poll", **fields)
    assert (answer.status_code, "Nothing was done" in answer.text) == (400, True)
    assert web_coordinator.polls.all() == []


DEEDS = {
    "/desk/announce": {"text": "x", "hours": "24"},
    "/desk/end-announcement": {"id": "1"},
    "/desk/pause": {"reason": "x"},
    "/desk/resume": {},
    "/desk/anneal": {"samples": "1", "confirm": "yes"},
    "/desk/end-lease": {"peer": "x"},
    "/desk/make-poll": {"slug": "x", "title": "x", "opens": at(0), "closes": at(60)},
    "/desk/change-poll": {"slug": "name", "title": "x", "opens": at(0), "closes": at(60)},
    "/desk/close-poll": {"slug": "name"},
}


@pytest.mark.parametrize("path", DEEDS)
def test_nobody_else_does_anything_at_the_desk(
    web_app: FastAPI, web_coordinator: Coordinator, moderator: LocalBrowser, path: str
) -> None:
    coordinator, now = web_coordinator, time.time()
    coordinator.bulletin.announce("stays", 1, "Mitu")
    coordinator.polls.make("name", "Its name", "", now - 60, now + 3600, "Mitu")
    before = (coordinator.allowlist.log(), coordinator.admission.notice(), coordinator.run.read_order())
    asha, stranger = LocalBrowser(web_app, "Asha"), LocalBrowser(web_app)
    assert asha.post(path, **DEEDS[path]).status_code == 403
    assert stranger.post(path, **DEEDS[path]).status_code == 303  # to sign in
    for headers in ({"Origin": "https://evil.example"}, {"Sec-Fetch-Site": "cross-site"}):
        assert moderator.post(path, headers=headers, **DEEDS[path]).status_code == 403
    assert moderator.post(path, form="guessed", **DEEDS[path]).status_code == 403
    coordinator.allowlist.decide(["Mitu"], "suspend", "organizer", "for the test")
    assert moderator.post(path, **DEEDS[path]).status_code == 403
    coordinator.allowlist.decide(["Mitu"], "approve", "organizer")
    after = (coordinator.allowlist.log()[2:], coordinator.admission.notice(), coordinator.run.read_order())
    assert after == before


def test_the_desk_speaks_to_moderators_only_and_in_their_language(web_app: FastAPI, moderator: LocalBrowser) -> None:
    assert LocalBrowser(web_app, "Asha").get("/desk").status_code == 403
    assert LocalBrowser(web_app).get("/desk").status_code == 303
    assert moderator.post("/desk/dance").status_code == 404
    assert '<html lang="bn">' in moderator.get("/desk", headers={"Accept-Language": "bn"}).text


def test_a_disk_that_refuses_is_a_page_that_says_so(
    web_coordinator: Coordinator, moderator: LocalBrowser, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise StorageError("ledger.sqlite: make room")

    monkeypatch.setattr(web_coordinator.bulletin, "announce", refuse)
    answer = moderator.post("/desk/announce", text="x", hours="24")
    assert (answer.status_code, "make room" in answer.text) == (503, True)
