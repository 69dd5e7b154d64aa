import pytest

from kantha.swarm.groups import MARGIN, Agreement, Dissolved, Group, Member, Refusal, RollCall, Status

PATIENCE = 10.0


def member(name: str, dialable: bool = True) -> Member:
    return Member(name, dialable)


def roll_call(*here: str, suspects: tuple[str, ...] = (), not_before: float = 0.0) -> RollCall:
    roll = RollCall(member("a"), 5, "x", PATIENCE, now=0.0)
    roll.lead({"a", *here}, suspects, not_before)
    return roll


def members(group: object) -> list[str]:
    assert isinstance(group, Group)
    return [each.peer for each in group.members]


def test_a_group_begins_when_all_who_are_here_are_in() -> None:
    roll = roll_call("b", "c")
    assert roll.join(member("b"), 5, "x") is None
    assert roll.poll(1.0, "g") is None
    assert roll.join(member("c", dialable=False), 5, "x") is None
    group = roll.poll(1.1, "g")
    assert members(group) == ["a", "b", "c"]
    assert isinstance(group, Group)
    assert (group.id, group.round, group.lineage, group.reducers) == ("g", 5, "x", ("a", "b"))


def test_it_does_not_begin_before_the_target_batch_is_there_nor_without_its_leader() -> None:
    assert roll_call(not_before=3.0).poll(2.9, "g") is None
    assert members(roll_call(not_before=3.0).poll(3.0, "g")) == ["a"]
    led_by_nobody = RollCall(member("a"), 5, "x", PATIENCE, now=0.0)
    led_by_nobody.join(member("b"), 5, "x")
    assert led_by_nobody.poll(PATIENCE + 1, "g") is None


def test_after_a_while_it_begins_without_some_but_not_without_most() -> None:
    roll = roll_call("b", "c", "d", "e")
    roll.join(member("b"), 5, "x")
    assert roll.poll(PATIENCE, "g") is None  # two of five
    roll.join(member("c"), 5, "x")
    assert members(roll.poll(PATIENCE, "g")) == ["a", "b", "c"]


def test_it_is_dissolved_when_most_never_come() -> None:
    roll = roll_call("b", "c")
    assert roll.poll(3 * PATIENCE - 0.1, "g") is None
    assert isinstance(roll.poll(3 * PATIENCE, "g"), Dissolved)


def test_who_broke_an_attempt_is_left_out_unless_the_others_are_too_few() -> None:
    roll = roll_call("b", "c", suspects=("c",))
    roll.join(member("b"), 5, "x")
    roll.join(member("c"), 5, "x")
    assert members(roll.poll(0.0, "g")) == ["a", "b"]
    alone = roll_call("c", suspects=("c",))
    alone.join(member("c"), 5, "x")
    assert members(alone.poll(PATIENCE, "g")) == ["a", "c"]


def test_a_peer_of_another_round_or_lineage_or_too_late_is_refused() -> None:
    roll = roll_call("b")
    assert roll.join(member("b"), 6, "x") is Refusal.NOT_YET
    assert roll.join(member("b"), 4, "x") is Refusal.BEHIND
    assert roll.join(member("b"), 5, "y") is Refusal.LINEAGE
    roll.join(member("b"), 5, "x")
    assert members(roll.poll(0.0, "g")) == ["a", "b"]
    assert roll.join(member("c"), 5, "x") is Refusal.OVER


def test_a_peer_that_is_gone_again_is_not_in_the_group() -> None:
    roll = roll_call("b", "c")
    for name in ("b", "c"):
        roll.join(member(name), 5, "x")
    roll.drop("b")
    assert members(roll.poll(PATIENCE, "g")) == ["a", "c"]


def agreement(*others: Member, me: Member | None = None) -> Agreement:
    group = Group("g", 5, "x", tuple(sorted([me or member("a"), *others], key=lambda each: each.peer)))
    return Agreement(group, "a", deadline=100.0)


def test_a_result_counts_when_a_second_one_holds_it() -> None:
    agreed = agreement(member("b"))
    agreed.hold(1.0)
    assert agreed.status is Status.HELD
    assert agreed.questions(1.0) == ["b"]
    agreed.answered("b", Status.RUNNING)
    assert agreed.status is Status.HELD
    agreed.answered("b", Status.COMMITTED)
    assert agreed.status is Status.COMMITTED


def test_the_one_that_is_asked_by_a_holder_counts_it_too() -> None:
    asked = agreement(member("b"))
    asked.hold(1.0)
    assert asked.asked(Status.HELD, 2.0) is Status.COMMITTED


def test_a_question_that_waited_while_this_peer_was_frozen_does_not_count() -> None:
    thawed = agreement(member("b"))
    thawed.hold(1.0)
    late = 100.0 + MARGIN / 2
    assert thawed.asked(Status.HELD, late) is Status.HELD  # who asked has given it up since
    thawed.answered("b", Status.HELD)  # as old
    assert thawed.status is Status.HELD
    assert thawed.asked(Status.COMMITTED, late) is Status.COMMITTED  # that is never taken back


def test_where_nobody_else_can_be_dialled_it_counts_when_somebody_asks() -> None:
    agreed = agreement(member("b", dialable=False))
    agreed.hold(1.0)
    assert agreed.status is Status.HELD
    assert agreed.questions(1.0) == []
    assert agreed.asked(Status.HELD, 2.0) is Status.COMMITTED


def test_a_group_of_one_counts_its_result_at_once() -> None:
    agreed = agreement()
    agreed.hold(1.0)
    assert agreed.status is Status.COMMITTED


def test_nobody_begins_to_hold_a_result_after_the_deadline() -> None:
    agreed = agreement(member("b"))
    agreed.hold(100.0)
    assert agreed.status is Status.RUNNING


def test_who_lacks_a_part_asks_and_learns_who_can_help() -> None:
    agreed = agreement(member("b"), member("c", dialable=False))
    assert agreed.questions(1.0) == []
    agreed.stick(unfinished=False)
    assert agreed.questions(1.0) == ["b"]
    agreed.answered("b", Status.COMMITTED)
    assert agreed.helpers == ["b"]
    agreed.adopt()
    assert agreed.status is Status.COMMITTED


def test_a_reducer_that_could_not_finish_ends_it_for_everybody() -> None:
    broken = agreement(member("b"))
    broken.stick(unfinished=True)
    assert broken.status is Status.BROKEN
    other = agreement(member("b"))
    other.stick(unfinished=False)
    other.answered("b", Status.BROKEN)
    assert other.status is Status.BROKEN


def test_it_is_given_up_when_all_others_have_or_nobody_answers_long_after_the_deadline() -> None:
    agreed = agreement(member("b"), member("c"))
    agreed.stick(unfinished=False)
    agreed.answered("b", Status.ABANDONED)
    agreed.poll(2.0)
    assert agreed.status is Status.RUNNING  # c may hold it
    agreed.answered("c", Status.ABANDONED)
    agreed.poll(2.0)
    assert agreed.status is Status.ABANDONED

    silent = agreement(member("b"))
    silent.hold(1.0)
    silent.answered("b", None)
    silent.poll(100.0 + MARGIN - 0.1)
    assert silent.status is Status.HELD
    silent.poll(100.0 + MARGIN)
    assert silent.status is Status.ABANDONED

    uncounted = agreement(member("b"))
    uncounted.hold(1.0)
    uncounted.answered("b", Status.HELD)
    uncounted.poll(100.0 + MARGIN)
    assert uncounted.status is Status.HELD
    uncounted.poll(100.0 + 2 * MARGIN)
    assert uncounted.status is Status.ABANDONED


@pytest.mark.parametrize("status", [Status.ABANDONED, Status.BROKEN, Status.COMMITTED])
def test_a_decision_is_final(status: Status) -> None:
    agreed = agreement(member("b"))
    agreed.status = status
    agreed.hold(1.0)
    agreed.adopt()
    agreed.answered("b", Status.COMMITTED)
    agreed.poll(1000.0)
    assert agreed.status is status
