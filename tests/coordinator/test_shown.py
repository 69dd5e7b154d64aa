"""How people are known to everybody: names, nicknames, teams; and what stays of those who leave for good."""

import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest

from kantha.coordinator.allowlist import SOMEONE_WHO_LEFT, Action, Allowlist, Person, Shown, State
from kantha.coordinator.database import Database
from kantha.errors import MembershipError

KEY = b"k" * 32


@pytest.fixture
def allowlist(tmp_path: Path) -> Iterator[Allowlist]:
    database = Database(tmp_path / "ledger.sqlite")
    allowlist = Allowlist(database, accounts_key=KEY)
    for name in ("asha", "rafiq", "mitu"):
        allowlist.sign_in(person(name))
    yield allowlist
    database.close()


def person(username: str, subject: str = "") -> Person:
    return Person(username, subject or f"number-of-{username.lower()}", "huggingface", ())


def local(username: str) -> Person:
    return Person(username, "", "local", ())


# ---- how somebody is shown


def test_people_are_shown_as_they_choose(allowlist: Allowlist) -> None:
    numbers = {name: allowlist.profile(name).number for name in ("asha", "rafiq", "mitu")}
    allowlist.show_as("rafiq", Shown.NICKNAME, " রফিক  ভাই ")
    allowlist.show_as("mitu", Shown.HIDDEN)
    assert allowlist.shown() == {numbers["asha"]: "asha", numbers["rafiq"]: "রফিক ভাই"}
    allowlist.show_as("rafiq", Shown.NAME)  # the nickname stays his, for another time
    assert allowlist.shown()[numbers["rafiq"]] == "rafiq"
    assert allowlist.show_as("rafiq", Shown.NICKNAME).name == "রফিক ভাই"


@pytest.mark.parametrize(
    "nickname",
    [
        "Rafiq",
        "ＲＡＦＩＱ",
        "ra\u200dfiq",
        "Rooster",
        "ROOSTER",
        "roo\u200cster",
        "x",
        "",
        "…",
        "a" * 41,
        "a\nb",
        "\u202egnp",
    ],
)
def test_a_nickname_is_one_short_line_and_nobody_elses(allowlist: Allowlist, nickname: str) -> None:
    allowlist.show_as("mitu", Shown.NICKNAME, "Rooster")
    with pytest.raises(MembershipError):
        allowlist.show_as("asha", Shown.NICKNAME, nickname)
    assert allowlist.profile("asha").name == "asha"


def test_ones_own_names_are_no_obstacle(allowlist: Allowlist) -> None:
    assert allowlist.show_as("asha", Shown.NICKNAME, "Asha").name == "Asha"
    assert allowlist.show_as("asha", Shown.NICKNAME, "ASHA").name == "ASHA"


@pytest.mark.parametrize("comes", [person("Tuli"), local("tuli")], ids=["signed in", "local"])
def test_a_username_takes_its_name_back_from_a_nickname(allowlist: Allowlist, comes: Person) -> None:
    allowlist.show_as("asha", Shown.NICKNAME, "tuli")
    number = allowlist.profile("asha").number
    allowlist.sign_in(comes)
    assert number not in allowlist.shown()
    assert list(allowlist.shown().values()).count(comes.username) == 1


def test_a_moderator_takes_a_nickname_away_and_says_why(allowlist: Allowlist) -> None:
    number = allowlist.show_as("asha", Shown.NICKNAME, "rude word").number
    with pytest.raises(MembershipError, match="reason"):
        allowlist.take_nickname(number, "mitu", " ")
    allowlist.take_nickname(number, "mitu", "that is rude")
    assert number not in allowlist.shown()
    decision = allowlist.log(1)[0]
    assert (decision.by, decision.action, decision.username, decision.reason) == (
        "mitu",
        "no nickname",
        "asha",
        "that is rude",
    )
    with pytest.raises(MembershipError):
        allowlist.take_nickname(number, "mitu", "again")


# ---- teams


def test_a_team_is_founded_joined_left_and_gone_with_the_last(allowlist: Allowlist) -> None:
    team = allowlist.found_team("asha", "Dhaka Devs")
    allowlist.join_team("rafiq", team.number)
    assert [(each.name, each.people) for each in allowlist.teams()] == [("Dhaka Devs", 2)]
    allowlist.join_team("asha", None)
    assert allowlist.profile("asha").team is None
    allowlist.found_team("rafiq", "Chattogram")  # and leaves the other, as its last one
    assert [each.name for each in allowlist.teams()] == ["Chattogram"]
    with pytest.raises(MembershipError, match="gone"):
        allowlist.join_team("mitu", team.number)
    allowlist.join_team("rafiq", None)
    assert allowlist.found_team("mitu", "Sylhet").number > team.number + 1  # an old link leads to no other team


@pytest.mark.parametrize(
    ("name", "is_free"),
    [
        ("dhaka devs", False),
        ("Dhaka-Devs!", False),
        ("DHAKA  DEV", False),
        ("Dhaka\u200dDevs", False),
        ("Khulna Devs", True),
        ("class 9", True),
        ("বাংলা দল", True),
    ],
)
def test_a_teams_name_cannot_be_mistaken_for_anothers(allowlist: Allowlist, name: str, is_free: bool) -> None:
    allowlist.found_team("asha", "Dhaka Devs")
    allowlist.found_team("mitu", "class 10")
    if is_free:
        assert allowlist.found_team("rafiq", name).name == name
    else:
        with pytest.raises(MembershipError, match="Dhaka Devs"):
            allowlist.found_team("rafiq", name)


def test_vowel_signs_tell_two_names_apart(allowlist: Allowlist) -> None:
    allowlist.found_team("asha", "কলা")
    assert allowlist.found_team("rafiq", "কলি").name == "কলি"


def test_a_moderator_dissolves_a_team(allowlist: Allowlist) -> None:
    team = allowlist.found_team("asha", "rude words")
    allowlist.dissolve_team(team.number, "mitu", "that is rude")
    assert allowlist.teams() == []
    assert allowlist.profile("asha").team is None
    assert allowlist.log(1)[0].action == "no team"


# ---- leaving for good


def test_nothing_of_who_left_is_in_the_database_but_the_number(allowlist: Allowlist, tmp_path: Path) -> None:
    allowlist.sign_in(person("asha-2", "number-of-asha"))  # another name of the same account
    allowlist.show_as("asha-2", Shown.NICKNAME, "Starling")
    allowlist.found_team("asha-2", "Birds")
    allowlist.set_moderator("asha-2", True, "mitu")
    allowlist.decide(["rafiq"], "approve", "asha-2")
    allowlist.decide(["asha-2"], "suspend", "mitu", "asha-2 of Dhaka, call her")
    number = allowlist.forget("ASHA-2")
    assert number not in allowlist.shown()
    assert allowlist.profile_of(number) is None
    assert allowlist.account("number-of-asha") is None
    assert [each.username for each in allowlist.people()] == ["rafiq", "mitu"]
    assert sum(allowlist.count().values()) == 2
    assert allowlist.teams() == []
    assert {decision.by for decision in allowlist.log()} >= {SOMEONE_WHO_LEFT}
    with sqlite3.connect(tmp_path / "ledger.sqlite") as books:
        content = "\n".join(books.iterdump()).casefold()
    for trace in ("asha", "starling", "birds", "dhaka"):
        assert trace not in content


def test_a_number_is_never_anybody_elses(allowlist: Allowlist) -> None:
    numbers = {allowlist.profile(name).number for name in ("asha", "rafiq", "mitu")}
    last = max(("asha", "rafiq", "mitu"), key=lambda name: allowlist.profile(name).number)
    allowlist.forget(last)
    allowlist.sign_in(person(last))
    assert allowlist.profile(last).number not in numbers


def test_another_who_took_an_old_name_keeps_what_is_said_of_him(allowlist: Allowlist) -> None:
    allowlist.sign_in(person("asha-2", "number-of-asha"))
    allowlist.sign_in(person("asha", "another"))
    allowlist.decide(["asha"], "approve", "mitu")
    allowlist.forget("asha-2")
    assert allowlist.log(1)[0].username == "asha"


@pytest.mark.parametrize("action", ["refuse", "suspend", "ban"])
@pytest.mark.parametrize("comes", [person("asha"), person("newname", "number-of-asha")], ids=["as before", "renamed"])
def test_who_was_kept_out_stays_out_after_leaving(
    allowlist: Allowlist, tmp_path: Path, action: Action, comes: Person
) -> None:
    [before] = allowlist.decide(["asha"], action, "mitu", "spam")
    allowlist.forget("asha")
    again = Allowlist(Database(tmp_path / "ledger.sqlite"), accounts_key=KEY)  # the coordinator was restarted
    for _ in range(2):  # and it does not wear off
        standing = again.sign_in(comes)
        assert standing.state is before.state
        assert "before you left" in standing.reason
        again.forget(comes.username)
    again.sign_in(comes)
    again.decide([comes.username], "approve", "mitu")
    again.forget(comes.username)
    assert again.sign_in(comes).state is State.NEW


def test_a_banned_name_stays_banned_in_a_run_without_sign_in(allowlist: Allowlist) -> None:
    allowlist.sign_in(local("tuli"))
    allowlist.decide(["tuli"], "ban", "mitu", "spam")
    allowlist.forget("tuli")
    assert allowlist.sign_in(local("Tuli")).state is State.BANNED


def test_a_banned_name_that_nobody_had_signed_in_with_is_forgotten_and_stays_banned(allowlist: Allowlist) -> None:
    allowlist.decide(["spammer"], "ban", "mitu", "spam")
    allowlist.forget("spammer")
    assert allowlist.sign_in(person("spammer")).state is State.BANNED


def test_who_was_let_in_comes_back_as_a_stranger(allowlist: Allowlist) -> None:
    allowlist.decide(["asha"], "approve", "mitu")
    allowlist.forget("asha")
    assert allowlist.sign_in(person("asha")).state is State.NEW
