"""The community's polls: who may take part, what is an entry, what comes of it."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kantha.coordinator.allowlist import Allowlist, Person
from kantha.coordinator.database import Database
from kantha.coordinator.polls import MOST_ENTRIES, NAME_POLL, Poll, Polls, PollState
from kantha.errors import MembershipError

HOUR = 3600.0


class Community:
    """Members by name, and one poll of theirs."""

    def __init__(self, folder: Path, sign_in: Any) -> None:
        self.ahead = 0.0
        self.database = Database(folder / "ledger.sqlite")
        self.allowlist = Allowlist(self.database, now=self.now)
        self.polls = Polls(self.database, self.allowlist, sign_in, self.now)

    def now(self) -> float:
        return time.time() + self.ahead

    def person(self, name: str, *, is_approved: bool = True) -> int:
        self.allowlist.sign_in(Person(name, f"subject-of-{name}", "huggingface", ()))
        if is_approved:
            self.allowlist.decide([name], "approve", "mod")
        with self.database.reading() as session:
            return self.allowlist.number(session, name)

    def make(self, slug: str = NAME_POLL, opens: float = -60.0, closes: float = HOUR) -> Poll:
        now = self.now()
        return self.polls.make(slug, "The model's name", "What shall it be called?", now + opens, now + closes, "mod")

    def votes(self, slug: str = NAME_POLL) -> list[tuple[str, int]]:
        return [(entry.text, entry.votes) for entry in self.polls.entries(slug)]


@pytest.fixture
def community(tmp_path: Path) -> Iterator[Community]:
    community = Community(tmp_path, "huggingface")
    yield community
    community.database.close()


@pytest.fixture
def asha(community: Community) -> int:
    community.make()
    return community.person("Asha")


@pytest.fixture
def rafiq(community: Community) -> int:
    return community.person("Rafiq")


def test_members_propose_vote_once_each_and_take_back(community: Community, asha: int, rafiq: int) -> None:
    polls = community.polls
    kantha, shobdo = polls.propose("name", "কাঁথাBERT", asha), polls.propose("name", "Shobdo", rafiq)
    for _ in range(2):
        polls.vote("name", shobdo, asha)
    assert community.votes() == [("Shobdo", 2), ("কাঁথাBERT", 1)]
    polls.take_back("name", kantha, asha)
    polls.take_back("name", kantha, rafiq)  # who never voted for it
    assert community.votes() == [("Shobdo", 2), ("কাঁথাBERT", 0)]
    mine = {entry.text: (entry.is_mine, entry.has_my_vote) for entry in polls.entries("name", asha)}
    assert mine == {"Shobdo": (False, True), "কাঁথাBERT": (True, False)}
    assert not any(entry.has_my_vote or entry.is_mine for entry in polls.entries("name"))
    poll = polls.poll("name")
    assert poll is not None
    assert (poll.entries, poll.voters) == (2, 2)


@pytest.mark.parametrize(
    "again",
    ["Kantha BERT", "kanthabert", " KANTHA-BERT ", "ＫａｎｔｈａＢＥＲＴ", "Kantha\u200cBERT"],
)
def test_the_same_name_is_entered_once_however_it_is_typed(community: Community, asha: int, again: str) -> None:
    community.polls.propose("name", "KanthaBERT", asha)
    with pytest.raises(MembershipError, match="there already"):
        community.polls.propose("name", again, asha)


def test_bengali_letters_are_the_same_in_one_piece_or_two(community: Community, asha: int, rafiq: int) -> None:
    community.polls.propose("name", "বাড়ি", asha)  # one code point for the letter
    with pytest.raises(MembershipError, match="there already"):
        community.polls.propose("name", "বাড\u09bcি", rafiq)


@pytest.mark.parametrize(
    ("first", "second", "is_alike"),
    [
        ("নকশী কাঁথা", "নকশি কাঁথা", True),
        ("KanthaBERT", "KantaBERT", True),
        ("Kantha", "Kantha BERT", True),
        ("KanthaBERT", "sahajBERT", False),
        ("কাঁথা", "শব্দ", False),
        ("নদী", "নারী", False),
    ],
)
def test_nearly_the_same_is_pointed_out(
    community: Community, asha: int, first: str, second: str, is_alike: bool
) -> None:
    community.polls.propose("name", first, asha)
    assert community.polls.alike("name", second) == ([first] if is_alike else [])
    community.polls.propose("name", second, asha)  # pointed out, not forbidden


@pytest.mark.parametrize(
    "text",
    ["", " ", "...", "\u200d", "x" * 61, "two\nlines", "\x1b[2J", "\u202eabc", "a" + "\u0301" * 6, "\u0981\u0982"],
)
def test_what_is_no_entry_is_refused(community: Community, asha: int, text: str) -> None:
    with pytest.raises(MembershipError):
        community.polls.propose("name", text, asha)
    assert community.votes() == []


def test_one_person_proposes_so_many_and_hiding_makes_no_room(community: Community, asha: int) -> None:
    numbers = [community.polls.propose("name", f"name {letter}", asha) for letter in "abcde"[:MOST_ENTRIES]]
    community.polls.hide("name", numbers[0], "rude", "mod")
    with pytest.raises(MembershipError, match="as many as one person may"):
        community.polls.propose("name", "another", asha)


def test_polls_are_for_those_who_were_let_in(community: Community, asha: int) -> None:
    entry = community.polls.propose("name", "Kantha", asha)
    stranger = community.person("Stranger", is_approved=False)
    for act in (
        lambda: community.polls.propose("name", "Mine", stranger),
        lambda: community.polls.vote("name", entry, stranger),
    ):
        with pytest.raises(MembershipError, match="let you in"):
            act()
    community.allowlist.set_moderator("Stranger", True, "organizer")
    community.polls.vote("name", entry, stranger)
    community.allowlist.decide(["Stranger"], "ban", "mod", "sends noise")
    with pytest.raises(MembershipError, match="sends noise"):
        community.polls.vote("name", entry, stranger)
    assert community.votes() == [("Kantha", 1)], "who is banned has no say in it"


def test_where_nobody_signs_in_everybody_with_a_name_takes_part(tmp_path: Path) -> None:
    community = Community(tmp_path, "local")
    community.make()
    somebody = community.person("Somebody", is_approved=False)
    community.polls.propose("name", "Kantha", somebody)
    assert community.votes() == [("Kantha", 1)]
    community.database.close()


def test_a_hidden_entry_is_seen_by_who_proposed_it_and_by_moderators(
    community: Community, asha: int, rafiq: int
) -> None:
    polls = community.polls
    entry = polls.propose("name", "rude word", asha)
    polls.vote("name", entry, rafiq)
    with pytest.raises(MembershipError, match="takes a reason"):
        polls.hide("name", entry, " ", "mod")
    polls.hide("name", entry, "not kind", "mod")
    assert community.votes() == []
    assert [each.hidden for each in polls.entries("name", asha)] == ["not kind"]
    assert polls.entries("name", rafiq) == []
    assert len(polls.entries("name", with_hidden=True)) == 1
    with pytest.raises(MembershipError, match="hid"):
        polls.vote("name", entry, rafiq)
    with pytest.raises(MembershipError, match="hid it"):
        polls.propose("name", "Rude Word", rafiq)
    polls.show("name", entry, "mod")
    assert community.votes() == [("rude word", 2)]
    log = [(each.by, each.action, each.reason) for each in community.allowlist.log(2)]
    assert log == [("mod", "show entry", "rude word"), ("mod", "hide entry", "rude word: not kind")]


def test_a_poll_opens_and_closes_by_itself_and_its_result_is_final(community: Community) -> None:
    polls = community.polls
    assert community.make(opens=HOUR, closes=2 * HOUR).state == PollState.UPCOMING
    asha, rafiq, mitu = (community.person(name) for name in ("Asha", "Rafiq", "Mitu"))
    with pytest.raises(MembershipError, match="not opened yet"):
        polls.propose("name", "early", asha)
    community.ahead = HOUR + 1
    kantha, shobdo = polls.propose("name", "Kantha", asha), polls.propose("name", "Shobdo", rafiq)
    polls.vote("name", kantha, mitu)
    assert polls.winners("name") == []
    community.ahead = 2 * HOUR + 1
    for act in (
        lambda: polls.propose("name", "late", asha),
        lambda: polls.vote("name", shobdo, asha),
        lambda: polls.take_back("name", kantha, asha),
        lambda: polls.hide("name", kantha, "no", "mod"),
        lambda: polls.change("name", "x", "", community.now(), community.now() + HOUR, "mod"),
    ):
        with pytest.raises(MembershipError, match="final"):
            act()
    assert [(entry.text, entry.votes) for entry in polls.winners("name")] == [("Kantha", 2)]
    community.allowlist.decide(["Mitu"], "ban", "mod", "afterwards")
    polls.forget(asha)
    assert community.votes() == [("Kantha", 2), ("Shobdo", 1)]
    poll = polls.poll("name")
    assert poll is not None
    assert (poll.state, poll.voters) == (PollState.CLOSED, 3)


def test_as_many_votes_are_the_same_place(community: Community, asha: int, rafiq: int) -> None:
    for name, person in (("one", asha), ("two", rafiq)):
        community.polls.propose("name", name, person)
    third = community.polls.propose("name", "three", asha)
    community.polls.take_back("name", third, asha)
    assert [(entry.text, entry.place) for entry in community.polls.entries("name")] == [
        ("one", 1),
        ("two", 1),
        ("three", 3),
    ]
    community.polls.close("name", "mod")
    assert [entry.text for entry in community.polls.winners("name")] == ["one", "two"]


def test_a_poll_that_nobody_voted_in_has_no_winner(community: Community, asha: int) -> None:
    entry = community.polls.propose("name", "Kantha", asha)
    community.polls.take_back("name", entry, asha)
    community.polls.close("name", "mod")
    assert community.polls.winners("name") == []


def test_who_leaves_takes_votes_along_and_leaves_entries_behind(community: Community, asha: int, rafiq: int) -> None:
    entry = community.polls.propose("name", "Kantha", asha)
    community.polls.vote("name", entry, rafiq)
    community.polls.forget(asha)
    assert community.votes() == [("Kantha", 1)]
    assert [each.by for each in community.polls.entries("name")] == [None]


@pytest.mark.parametrize(
    "change",
    [
        {"slug": "../desk"},
        {"slug": ""},
        {"slug": "Name"},
        {"title": ""},
        {"title": "x" * 81},
        {"opens": 100.0, "closes": 50.0},
        {"opens": -100.0, "closes": -50.0},
        {"closes": 500 * 24 * HOUR},
        {"closes": float("nan")},
    ],
)
def test_what_can_be_no_poll_is_refused(community: Community, change: dict[str, Any]) -> None:
    now = community.now()
    fields = {"slug": "colour", "title": "Colour", "opens": 0.0, "closes": HOUR} | change
    with pytest.raises(MembershipError):
        community.polls.make(fields["slug"], fields["title"], "", now + fields["opens"], now + fields["closes"], "mod")
    assert community.polls.all() == []


def test_several_polls_do_not_mix(community: Community, asha: int) -> None:
    community.make("colour")
    red = community.polls.propose("colour", "red", asha)
    with pytest.raises(MembershipError, match="no such entry"):
        community.polls.vote("name", red, asha)
    with pytest.raises(MembershipError, match="at name already"):
        community.make("name")
    assert (community.votes("name"), community.votes("colour")) == ([], [("red", 1)])
    assert community.votes("none") == []
    changed = community.polls.change("colour", "Its colour", "?", community.now(), community.now() + HOUR, "mod")
    assert changed.title == "Its colour"
    assert {poll.slug for poll in community.polls.all()} == {"name", "colour"}
