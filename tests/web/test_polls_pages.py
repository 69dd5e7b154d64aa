"""/name and /polls: proposing, voting, hiding and results as people do it; and what strangers try."""

import csv
import io
import time

import pytest
from fastapi import FastAPI
from local_browser import LocalBrowser, text_of

from kantha.coordinator.polls import MOST_ENTRIES, Problem
from kantha.coordinator.service import Coordinator
from kantha.web.polls import PROBLEMS

HOSTILE = "<script>alert(1)</script>"


@pytest.fixture
def poll(web_coordinator: Coordinator) -> Coordinator:
    """A run whose poll for the name is open."""
    now = time.time()
    web_coordinator.polls.make("name", "The model's name", "What shall it be?", now - 60, now + 3600, "mod")
    return web_coordinator


@pytest.fixture
def asha(web_app: FastAPI, poll: Coordinator) -> LocalBrowser:
    return LocalBrowser(web_app, "Asha")


@pytest.fixture
def rafiq(web_app: FastAPI, poll: Coordinator) -> LocalBrowser:
    return LocalBrowser(web_app, "Rafiq")


@pytest.fixture
def moderator(web_app: FastAPI, poll: Coordinator) -> LocalBrowser:
    browser = LocalBrowser(web_app, "Mitu")
    poll.allowlist.set_moderator("Mitu", True, "organizer")
    return browser


def propose(browser: LocalBrowser, text: str, **fields: str) -> int:
    """Returns the entry's number."""
    answer = browser.post("/name", propose=text, **fields)
    assert answer.status_code == 303, answer.text
    return int(answer.headers["location"].rpartition("#entry-")[2])


def counts(coordinator: Coordinator) -> dict[str, int]:
    return {entry.text: entry.votes for entry in coordinator.polls.entries("name")}


def test_a_name_is_proposed_voted_for_and_the_vote_taken_back(
    asha: LocalBrowser, rafiq: LocalBrowser, poll: Coordinator
) -> None:
    entry = propose(asha, "কাঁথা")
    page = asha.text("/name")
    assert "“কাঁথা” is entered, with your vote for it." in page
    assert "proposed by you" in page
    assert "Your vote" in page
    assert "is entered" not in asha.text("/name"), "it is said once"
    assert "proposed by" not in rafiq.text("/name"), "who proposed it is nobody's business"
    answer = rafiq.post("/name", vote=entry)
    assert answer.headers["location"] == f"./name#entry-{entry}"
    rafiq.post("/name", vote=entry)
    assert counts(poll) == {"কাঁথা": 2}
    assert "2 votes" in asha.text("/name")
    rafiq.post("/name", take_back=entry)
    assert counts(poll) == {"কাঁথা": 1}


def test_nearly_the_same_is_pointed_out_before_it_is_entered(
    asha: LocalBrowser, rafiq: LocalBrowser, poll: Coordinator
) -> None:
    propose(asha, "নকশী কাঁথা")
    answer = rafiq.post("/name", propose="নকশি কাঁথা")
    assert answer.status_code == 200
    assert "“নকশি কাঁথা” is there already" in text_of(answer)
    assert counts(poll) == {"নকশী কাঁথা": 1}
    propose(rafiq, "নকশি কাঁথা", sure="1")
    assert counts(poll) == {"নকশী কাঁথা": 1, "নকশি কাঁথা": 1}
    again = rafiq.post("/name", propose=" নকশী-কাঁথা ", sure="1")
    assert (again.status_code, "is there already: vote for it" in text_of(again)) == (400, True)


def test_who_looks_is_told_how_to_take_part(web_app: FastAPI, poll: Coordinator) -> None:
    page = LocalBrowser(web_app).text("/name")
    assert "Sign in to take part" in page
    assert "What shall it be?" in page
    assert "Nothing is proposed yet" in page


def test_strangers_and_those_who_are_kept_out_change_nothing(
    web_app: FastAPI, asha: LocalBrowser, rafiq: LocalBrowser, poll: Coordinator
) -> None:
    entry = propose(asha, "Kantha")
    stranger = LocalBrowser(web_app)
    for fields in ({"vote": entry}, {"propose": "mine"}, {"hide": entry, "reason": "x"}):
        assert stranger.post("/name", **fields).status_code == 303  # to sign in
        assert rafiq.post("/name", headers={"Origin": "https://evil.example"}, **fields).status_code == 403
        assert rafiq.post("/name", form="guessed", **fields).status_code == 403
    poll.allowlist.decide(["Rafiq"], "ban", "mod", "sends noise")
    answer = rafiq.post("/name", vote=entry)
    assert answer.status_code == 403
    assert "sends noise" in text_of(answer)
    assert counts(poll) == {"Kantha": 1}


def test_only_moderators_hide_and_who_proposed_it_hears_why(
    asha: LocalBrowser, rafiq: LocalBrowser, moderator: LocalBrowser, poll: Coordinator
) -> None:
    entry = propose(asha, "rude word")
    assert rafiq.post("/name", hide=entry, reason="x").status_code == 403
    assert "takes a reason" in text_of(moderator.post("/name", hide=entry, reason=" "))
    assert "proposed by Asha" in moderator.text("/name")
    moderator.post("/name", hide=entry, reason="not kind")
    assert "rude word" not in rafiq.text("/name")
    assert "hidden by a moderator: not kind" in asha.text("/name")
    assert "Show again" in moderator.text("/name")
    moderator.post("/name", show=entry)
    assert "rude word" in rafiq.text("/name")


def test_the_result_is_shown_and_exported_when_the_poll_has_closed(
    asha: LocalBrowser, rafiq: LocalBrowser, poll: Coordinator
) -> None:
    entry = propose(asha, "কাঁথা")
    formula = propose(asha, "=1+1")
    rafiq.post("/name", vote=entry)
    poll.polls.close("name", "mod")
    page = rafiq.text("/name")
    assert "The result কাঁথা 2 votes · 2 people took part" in page
    assert "Propose" not in page
    late = rafiq.post("/name", vote=formula)
    assert (late.status_code, "its result is final" in text_of(late)) == (400, True)
    exported = rafiq.get("/polls/name/results.csv")
    assert exported.headers["content-type"].startswith("text/csv")
    assert list(csv.reader(io.StringIO(exported.content.decode("utf-8-sig")))) == [
        ["place", "text", "votes", "voters", "state"],
        ["1", "কাঁথা", "2", "2", "closed"],
        ["2", "'=1+1", "1", "2", "closed"],
    ], "a spreadsheet computes nothing that a stranger wrote"
    result = rafiq.get("/polls/name/results.json").json()
    assert (result["final"], result["voters"]) == (True, 2)
    assert result["entries"][1] == {"place": 2, "text": "=1+1", "votes": 1}
    assert "Result: কাঁথা" in rafiq.text("/polls")


def test_other_polls_have_a_page_of_their_own(asha: LocalBrowser, poll: Coordinator) -> None:
    now = time.time()
    poll.polls.make("meeting", "When do we meet?", "", now - 60, now + 3600, "mod")
    poll.polls.make("later", "Later", "", now + 1800, now + 3600, "mod")
    assert asha.get("/polls/name").headers["location"].endswith("../name")
    assert asha.post("/polls/meeting", propose="Friday").headers["location"].startswith("../polls/meeting#entry-")
    assert "Friday" in asha.text("/polls/meeting")
    assert "Opens in" in asha.text("/polls/later")
    assert asha.post("/polls/later", propose="x").status_code == 400
    for path in ("/polls/none", "/polls/none/results.csv"):
        assert asha.get(path).status_code == 404
    assert counts(poll) == {}


def test_before_there_is_a_poll_the_page_says_so(web_app: FastAPI, web_coordinator: Coordinator) -> None:
    assert "has not been set up yet" in LocalBrowser(web_app).text("/name")
    assert "There is no poll yet." in LocalBrowser(web_app).text("/polls")


@pytest.mark.parametrize("fields", [{}, {"vote": "x"}, {"vote": "9" * 30}, {"vote": "-1"}, {"vote": "²"}, {"hide": ""}])
def test_a_form_that_makes_no_sense_changes_nothing(
    asha: LocalBrowser, moderator: LocalBrowser, fields: dict[str, str]
) -> None:
    for browser in (asha, moderator):
        answer = browser.post("/name", **fields)
        assert answer.status_code in (400, 403)
        assert "Nothing was changed" in answer.text or "for moderators" in answer.text


@pytest.mark.parametrize("language", ["en", "bn"])
def test_an_entry_stays_text(web_app: FastAPI, asha: LocalBrowser, poll: Coordinator, language: str) -> None:
    propose(asha, HOSTILE)
    propose(asha, '"><img src=x onerror=alert(1)>', sure="1")
    looks = LocalBrowser(web_app, "Nila", language)
    alike = looks.post("/name", propose=HOSTILE.upper().replace("1", "2"))
    poll.polls.make("x", f"{HOSTILE} title", HOSTILE, time.time() - 9, time.time() + 99, "mod")
    for answer in (looks.get("/name"), looks.get("/polls"), looks.get("/polls/x"), alike):
        assert answer.status_code == 200
        assert "<script>alert" not in answer.text.lower()
        assert "<img" not in answer.text
    for entry in poll.polls.entries("name"):
        poll.polls.hide("name", entry.id, HOSTILE, "mod")
    assert "<script>alert" not in asha.get("/name").text
    poll.polls.close("name", "mod")
    assert "<script>alert" not in asha.get("/name").text


def test_an_entry_that_is_none_is_refused_with_a_reason(asha: LocalBrowser) -> None:
    for text, why in [("x" * 61, "at most 60 characters"), ("...", "needs a letter"), ("a\nb", "one line")]:
        answer = asha.post("/name", propose=text)
        assert (answer.status_code, why in text_of(answer)) == (400, True), text
    for letter in "abcde"[:MOST_ENTRIES]:
        propose(asha, f"{letter * 9}", sure="1")
    assert "as many as one person may" in text_of(asha.post("/name", propose="zzz"))
    assert "as many as one person may" in asha.text("/name")


def test_every_problem_has_a_sentence_in_the_page_s_language() -> None:
    assert PROBLEMS.keys() == set(Problem)
    for problem, sentence in PROBLEMS.items():
        assert sentence.removesuffix(".").casefold() == problem.value.casefold()


def test_numbers_are_in_the_digits_of_the_page_s_language(web_app: FastAPI, asha: LocalBrowser) -> None:
    propose(asha, "Kantha")
    page = LocalBrowser(web_app, "Nila", "bn").text("/name")
    assert "১" in page
    assert "1 " not in page.partition("Kantha")[2].replace("CSV", "")
