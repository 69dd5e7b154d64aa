"""Who may join, and who decided that."""

from pathlib import Path

import pytest

from kantha.coordinator.allowlist import MOST_NAMES, Action, Allowlist, Person, State, parse_names
from kantha.coordinator.database import Database
from kantha.errors import MembershipError


@pytest.fixture
def notified() -> list[str]:
    return []


@pytest.fixture
def allowlist(database: Database, notified: list[str]) -> Allowlist:
    return Allowlist(database, notified.append)


def person(username: str, subject: str = "", organisations: tuple[str, ...] = ()) -> Person:
    return Person(username, subject or f"number-of-{username.lower()}", "huggingface", organisations)


def put(allowlist: Allowlist, username: str, state: State) -> None:
    """Somebody who signed in and is in this state."""
    allowlist.sign_in(person(username))
    actions: dict[State, Action] = {
        State.APPROVED: "approve",
        State.REFUSED: "refuse",
        State.SUSPENDED: "suspend",
        State.BANNED: "ban",
    }
    if state is State.ASKED:
        allowlist.ask(username)
    elif state in actions:
        allowlist.decide([username], actions[state], "mod", "" if state is State.APPROVED else "spam")


# ---- asking and deciding


def test_somebody_asks_and_is_let_in(allowlist: Allowlist, notified: list[str]) -> None:
    assert allowlist.standing("asha").state is State.NEW
    assert allowlist.sign_in(person("asha")).state is State.NEW
    asked = allowlist.ask("asha")
    assert (asked.state, asked.by) == (State.ASKED, "asha")
    assert asked.sentence.startswith("⏳ ")
    assert allowlist.ask("asha") == asked
    [approved] = allowlist.decide(["asha"], "approve", "mod")
    assert (approved.state, approved.by) == (State.APPROVED, "mod")
    assert approved.sentence.startswith("✅ ")
    assert allowlist.standing("asha") == approved
    assert notified == ["asha"]


@pytest.mark.parametrize("state", [state for state in State if state is not State.NEW])
def test_to_ask_changes_nothing_for_whoever_was_answered(
    allowlist: Allowlist, notified: list[str], state: State
) -> None:
    put(allowlist, "asha", state)
    before = allowlist.standing("asha")
    notified.clear()
    assert allowlist.ask("asha") == before
    assert allowlist.sign_in(person("asha")) == before
    assert notified == []


@pytest.mark.parametrize("before", list(State))
@pytest.mark.parametrize(
    ("action", "after"),
    [
        ("approve", State.APPROVED),
        ("refuse", State.REFUSED),
        ("suspend", State.SUSPENDED),
        ("ban", State.BANNED),
    ],
)
def test_a_moderator_may_bring_everybody_into_every_state(
    allowlist: Allowlist, before: State, action: Action, after: State
) -> None:
    put(allowlist, "asha", before)
    [standing] = allowlist.decide(["asha"], action, "mod", "a reason")
    assert (standing.state, standing.reason) == (after, "a reason")
    assert allowlist.standing("asha").state is after
    assert standing.may_not == (action != "approve")
    assert ("a reason" in standing.sentence) == standing.may_not


@pytest.mark.parametrize("action", ["refuse", "suspend", "ban"])
def test_whoever_is_kept_out_is_told_why(allowlist: Allowlist, action: Action) -> None:
    for reason in ("", "   "):
        with pytest.raises(MembershipError, match="takes a reason"):
            allowlist.decide(["asha"], action, "mod", reason)
    assert allowlist.standing("asha").state is State.NEW
    assert allowlist.log() == []


@pytest.mark.parametrize("reason", ["two\nlines", "x" * 301, "a\u202eb"])
def test_a_reason_is_one_line_that_is_safe_to_show(allowlist: Allowlist, reason: str) -> None:
    with pytest.raises(MembershipError, match="one line"):
        allowlist.decide(["asha"], "ban", "mod", reason)


def test_a_list_of_names_is_decided_as_a_whole_or_not_at_all(allowlist: Allowlist) -> None:
    with pytest.raises(MembershipError, match="cannot be a username"):
        allowlist.decide(["asha", "mitu\n", "two\nlines"], "approve", "mod")
    assert allowlist.people() == []
    names = [f"user-{number}" for number in range(1_000)]
    assert len(allowlist.decide([*names, "USER-3"], "approve", "mod")) == 1_000
    assert allowlist.count() == {State.APPROVED: 1_000}


def test_names_may_be_approved_before_anybody_comes(allowlist: Allowlist, notified: list[str]) -> None:
    allowlist.decide(["@Asha"], "approve", "organizer")
    assert allowlist.sign_in(person("asha")).state is State.APPROVED
    assert notified == []


def test_usernames_are_the_same_in_all_letters(allowlist: Allowlist) -> None:
    put(allowlist, "Asha", State.ASKED)
    allowlist.decide(["aSHA"], "approve", "mod")
    assert allowlist.standing("ASHA").state is State.APPROVED
    assert [standing.username for standing in allowlist.people()] == ["Asha"]


def test_people_are_found_by_state_and_part_of_the_name(allowlist: Allowlist) -> None:
    for name in ("asha", "mitu", "ashok", "a_b"):
        put(allowlist, name, State.ASKED)
    allowlist.decide(["ashok"], "approve", "mod")
    assert next(iter(allowlist.people())).username == "ashok"  # changed last
    assert {each.username for each in allowlist.people(State.ASKED)} == {"asha", "mitu", "a_b"}
    assert {each.username for each in allowlist.people(search="ASH")} == {"asha", "ashok"}
    assert [each.username for each in allowlist.people(search="_")] == ["a_b"]
    assert allowlist.people(search="%") == []
    pages = [allowlist.people(limit=3, offset=offset) for offset in (0, 3)]
    assert sorted(each.username for page in pages for each in page) == ["a_b", "asha", "ashok", "mitu"]


def test_who_did_what_when_is_kept(allowlist: Allowlist, place: Path | str) -> None:
    allowlist.sign_in(person("asha"))
    allowlist.ask("asha")
    allowlist.decide(["asha"], "refuse", "mod", "who is this?")
    allowlist.decide(["asha"], "refuse", "mod", "who is this?")  # twice the same is once
    allowlist.decide(["asha"], "approve", "other")
    allowlist.set_moderator("asha", True, "organizer")
    allowlist.set_rule("bengal", True, "other")
    database = Database(place)
    again = Allowlist(database)
    assert [(each.by, each.action, each.username, each.reason) for each in reversed(again.log())] == [
        ("asha", "ask", "asha", ""),
        ("mod", "refuse", "asha", "who is this?"),
        ("other", "approve", "asha", ""),
        ("organizer", "moderator", "asha", ""),
        ("other", "rule", "bengal", ""),
    ]
    times = [each.time for each in again.log()]
    assert times == sorted(times, reverse=True)
    assert len(again.log(2)) == 2
    database.close()


def test_moderators_are_named_and_whoever_is_kept_out_is_none(allowlist: Allowlist) -> None:
    assert not allowlist.is_moderator("asha")
    allowlist.set_moderator("Asha", True, "organizer")
    assert allowlist.is_moderator("asha")
    allowlist.decide(["asha"], "suspend", "organizer", "on holiday")
    assert not allowlist.is_moderator("asha")
    allowlist.decide(["asha"], "approve", "organizer")
    assert allowlist.is_moderator("asha")
    allowlist.set_moderator("asha", False, "organizer")
    assert not allowlist.is_moderator("asha")


# ---- accounts and their names


def test_a_name_that_another_account_takes_up_inherits_nothing(allowlist: Allowlist) -> None:
    allowlist.sign_in(person("asha", "1"))
    allowlist.decide(["asha"], "approve", "mod")
    with pytest.raises(MembershipError, match="another account"):
        allowlist.sign_in(person("Asha", "2"))
    assert allowlist.sign_in(person("asha", "1")).state is State.APPROVED


@pytest.mark.parametrize("state", [State.APPROVED, State.BANNED])
def test_an_account_that_changes_its_name_stays_who_it_is(allowlist: Allowlist, state: State) -> None:
    put(allowlist, "asha", state)
    renamed = allowlist.sign_in(person("ashok", "number-of-asha"))
    assert (renamed.username, renamed.state) == ("ashok", state)
    assert allowlist.standing("asha").state is State.NEW
    assert allowlist.sign_in(person("asha", "a newcomer")).state is State.NEW
    assert allowlist.log()[0].action == "rename"


@pytest.mark.parametrize(
    ("was", "listed", "becomes"),
    [
        (State.BANNED, State.APPROVED, State.BANNED),
        (State.APPROVED, State.BANNED, State.BANNED),
        (State.ASKED, State.APPROVED, State.APPROVED),
    ],
)
def test_an_account_that_takes_a_name_of_the_list_gets_no_better_by_it_where_it_is_kept_out(
    allowlist: Allowlist, was: State, listed: State, becomes: State
) -> None:
    put(allowlist, "asha", was)
    allowlist.decide(["ashok"], "approve" if listed is State.APPROVED else "ban", "mod", "as listed")
    assert allowlist.sign_in(person("ashok", "number-of-asha")).state is becomes
    assert [each.username for each in allowlist.people()] == ["ashok"]


def test_an_account_cannot_take_the_name_of_another_one_that_is_known(allowlist: Allowlist) -> None:
    put(allowlist, "asha", State.APPROVED)
    put(allowlist, "mitu", State.BANNED)
    with pytest.raises(MembershipError, match="another account"):
        allowlist.sign_in(person("asha", "number-of-mitu"))
    assert allowlist.standing("asha").state is State.APPROVED
    assert allowlist.standing("mitu").state is State.BANNED


@pytest.mark.parametrize("username", ["", "  ", "two\nlines", "x" * 97, "a\u202eb"])
def test_what_cannot_be_a_name_is_refused(allowlist: Allowlist, username: str) -> None:
    with pytest.raises(MembershipError):
        allowlist.sign_in(person(username, "1"))
    assert allowlist.people() == []


def test_an_account_without_a_number_is_refused(allowlist: Allowlist) -> None:
    with pytest.raises(MembershipError, match="which account"):
        allowlist.sign_in(Person("asha", "", "huggingface", ()))


def test_nobody_asks_for_somebody_who_never_signed_in(allowlist: Allowlist) -> None:
    with pytest.raises(MembershipError, match="nobody named 'asha'"):
        allowlist.ask("asha")


# ---- rules


def test_members_of_an_organisation_are_approved_when_they_sign_in(allowlist: Allowlist, notified: list[str]) -> None:
    allowlist.set_rule("Bengal-AI", True, "organizer")
    assert allowlist.rules() == ["Bengal-AI"]
    standing = allowlist.sign_in(person("asha", organisations=("other", "bengal-ai")))
    assert (standing.state, standing.by) == (State.APPROVED, "rule: member of Bengal-AI")
    assert allowlist.sign_in(person("mitu", organisations=("other",))).state is State.NEW
    put(allowlist, "rahim", State.ASKED)
    assert allowlist.sign_in(person("rahim", organisations=("bengal-ai",))).state is State.APPROVED
    assert allowlist.log()[0].by == "rule: member of Bengal-AI"
    allowlist.set_rule("bengal-ai", False, "organizer")
    assert allowlist.rules() == []
    assert allowlist.sign_in(person("sima", organisations=("bengal-ai",))).state is State.NEW
    assert allowlist.standing("asha").state is State.APPROVED


@pytest.mark.parametrize("state", [State.REFUSED, State.SUSPENDED, State.BANNED])
def test_a_rule_does_not_overrule_a_moderator(allowlist: Allowlist, state: State) -> None:
    allowlist.set_rule("bengal", True, "organizer")
    put(allowlist, "asha", state)
    assert allowlist.sign_in(person("asha", organisations=("bengal",))).state is state


@pytest.mark.parametrize("organisation", ["", "a b", "x" * 97, "../a", "a\n"])
def test_what_cannot_be_an_organisation_is_no_rule(allowlist: Allowlist, organisation: str) -> None:
    with pytest.raises(MembershipError, match="cannot be an organisation"):
        allowlist.set_rule(organisation, True, "organizer")


# ---- lists


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("asha\n@mitu\n\n  rahim  \n# a note\nASHA\n", ["asha", "mitu", "rahim"]),
        ("Username\nasha\n", ["asha"]),
        ('\ufeffname,username,since\r\nAsha K.,asha,2020\r\n"Mitu, of Dhaka",@mitu,2021\r\n', ["asha", "mitu"]),
        ("", []),
        ("a.b-c_d\n9lives\n_x\nneuralspace-reverie\nx\n", ["a.b-c_d", "9lives", "_x", "neuralspace-reverie", "x"]),
    ],
)
def test_a_pasted_list_or_a_csv_gives_names(text: str, names: list[str]) -> None:
    assert parse_names(text) == names


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("asha\nnot a name\n", 2),
        ("asha\n\nhttps://huggingface.co/mitu\n", 3),
        ("asha, mitu\n", 1),  # which of them?
        ("name,username\nAsha,asha\nMitu,\n", 3),
        ("name,username\nAsha\n", 2),
        ("-asha\n", 1),
        ("x" * 97, 1),
        ("আশা\n", 1),
        ("asha\x00\n", 1),
    ],
)
def test_the_line_that_is_no_username_is_named(text: str, line: int) -> None:
    with pytest.raises(MembershipError, match=f"line {line}: ") as caught:
        parse_names(text)
    assert str(caught.value).isprintable()


def test_a_list_has_its_limit() -> None:
    assert len(parse_names("\n".join(f"user-{number}" for number in range(MOST_NAMES)))) == MOST_NAMES
    with pytest.raises(MembershipError, match="5,001 names are more than 5,000"):
        parse_names("\n".join(f"user-{number}" for number in range(MOST_NAMES + 1)))


def test_a_field_of_a_csv_without_end_is_told() -> None:
    with pytest.raises(MembershipError, match=r"no list of usernames|no username"):
        parse_names('username\n"' + "x" * 200_000)
