"""One attempt to finish a round, without I/O: who averages together, and whether what came of it counts.

`RollCall` is the leader's side of forming a group. `Agreement` is every member's side of deciding, when the all-reduce
is over, whether the group's result is the round's. Both take what happened and the clock, and say what to do; the
averager process feeds them from libp2p, `simulation/` from a virtual network.

The result of a group is unique: it needs every part of every member, and the reducer of a part sends all members the
same bytes. So replicas can only part ways where some members count a group's result and others begin the round again.
Three rules prevent that:

* a group needs more than half of the peers that are here, so that two groups of one round cannot both form;
* a result counts for a member when a second one holds it whole as well: then a single peer that dies takes no result
  with it that somebody has counted;
* nobody begins to hold a result after the group's deadline, and nobody gives a group up before that (plus a margin for
  messages under way) unless each of the others has given it up, or a reducer ended before it sent its parts.

What is left is a network that falls apart at the wrong moment. Then two lineages exist for a while, and the one that
has come farther wins (`rounds.py`).
"""

from collections.abc import Collection
from dataclasses import dataclass
from enum import Enum

MARGIN = 5.0  # seconds after a group's deadline until a member that nobody answers may give it up
ASK_AGAIN = 0.5  # seconds between two questions to the same member
ASK_AGAIN_SILENT = 2.0  # the same, where the last one was not answered


@dataclass(frozen=True)
class Member:
    """One peer of a group."""

    peer: str
    dialable: bool  # accepts connections, so it reduces a share of the parts and can be asked


@dataclass(frozen=True)
class Group:
    """Peers that average together once."""

    id: str
    round: int  # that it is to finish
    lineage: str  # of the round before; members have it in common
    members: tuple[Member, ...]  # sorted by peer
    order: str = ""  # the organizer's newest that the leader knows (`orders.py`); followed with the result

    @property
    def reducers(self) -> tuple[str, ...]:
        return tuple(member.peer for member in self.members if member.dialable)


class Refusal(Enum):
    """Why a leader does not take a peer in."""

    NOT_YET = "not yet"  # the leader has not finished the round before
    BEHIND = "behind"  # the leader has finished this round
    LINEAGE = "lineage"  # the leader has another result of the round before
    FOLLOWS = "follows"  # it follows another leader in this attempt, and says which
    OVER = "over"  # the group has begun


@dataclass(frozen=True)
class Dissolved:
    """The roll call ends without a group."""

    reason: str


class RollCall:
    """The leader's list of who takes part in a round.

    It begins when all who are expected are in, not before the target batch is there; after `patience` seconds without
    some of them, if it has more than half of the peers that are here. After three times that it is dissolved. Peers
    that broke an attempt a moment ago are left out, unless the others are too few without them.
    """

    def __init__(self, me: Member, round_number: int, lineage: str, patience: float, now: float) -> None:
        """
        :param round_number: the round to finish
        :param lineage: of the round before
        """
        self.round = round_number
        self.lineage = lineage
        self.begun = False
        self._me = me
        self._patience = patience
        self._opened = now
        self._joined: dict[str, Member] = {}
        self._here: frozenset[str] = frozenset()
        self._suspects: frozenset[str] = frozenset()
        self._not_before: float | None = None  # None: the leader itself is not in yet

    def lead(self, here: Collection[str], suspects: Collection[str], not_before: float) -> None:
        """The leader itself takes part.

        :param here: peers that are in the swarm and ready
        :param suspects: those of them that broke an attempt a moment ago
        :param not_before: when the target batch is reached
        """
        self._here = frozenset(here)
        self._suspects = frozenset(suspects) - {self._me.peer}
        self._not_before = not_before
        self._joined[self._me.peer] = self._me

    def join(self, member: Member, round_number: int, lineage: str) -> Refusal | None:
        """A peer asks to take part; None: it is in."""
        if round_number != self.round:
            return Refusal.NOT_YET if round_number > self.round else Refusal.BEHIND
        if lineage != self.lineage:
            return Refusal.LINEAGE
        if self.begun:
            return Refusal.OVER
        self._joined[member.peer] = member
        return None

    def drop(self, peer: str) -> None:
        """A peer that was in is gone before the group began."""
        if not self.begun:
            self._joined.pop(peer, None)

    def poll(self, now: float, group_id: str) -> Group | Dissolved | None:
        """The group, once it can begin; `Dissolved` when it never will; None: wait."""
        if self.begun:
            return None
        waited = now - self._opened
        if self._not_before is not None and now >= self._not_before:
            missing = self._here - self._suspects - self._joined.keys()
            if not missing or waited >= self._patience:
                trusted = self._joined.keys() - self._suspects
                for members in (trusted, self._joined.keys()):
                    if 2 * len(members) > len(self._here | self._joined.keys()):
                        self.begun = True
                        chosen = tuple(self._joined[peer] for peer in sorted(members))
                        return Group(group_id, self.round, self.lineage, chosen)
        if waited >= 3 * self._patience:
            self.begun = True
            return Dissolved(f"{len(self._joined)} of {len(self._here | self._joined.keys())} peers came")
        return None


class Status(Enum):
    """How far a member is with a group's result."""

    RUNNING = "running"
    HELD = "held"  # it has every part
    COMMITTED = "committed"  # the result counts
    ABANDONED = "abandoned"  # it will never count for this member
    BROKEN = "broken"  # as abandoned, and a reducer could not finish its parts: nobody can hold the result


class Agreement:
    """One member's decision whether a group's result counts.

    Everything that happens is told to it; `status` is the decision, `questions` whom to ask for theirs next, `helpers`
    who holds what this member lacks.
    """

    def __init__(self, group: Group, me: str, deadline: float) -> None:
        """:param deadline: on this member's clock; later nobody begins to hold the result"""
        self.group = group
        self.status = Status.RUNNING
        self.deadline = deadline
        self.helpers: list[str] = []
        self._me = me
        self._others = [member.peer for member in group.members if member.dialable and member.peer != me]
        self._answers: dict[str, Status | None] = {}
        self._asked: dict[str, float] = {}
        self._stuck = False

    @property
    def decided(self) -> bool:
        return self.status in (Status.COMMITTED, Status.ABANDONED, Status.BROKEN)

    def hold(self, now: float) -> None:
        """Every part is here."""
        if self.status is Status.RUNNING and now < self.deadline:
            self.status = Status.HELD if len(self.group.members) > 1 else Status.COMMITTED

    def adopt(self) -> None:
        """The whole result was fetched from a member for which it counts."""
        if not self.decided:
            self.status = Status.COMMITTED

    def stick(self, *, unfinished: bool) -> None:
        """The all-reduce ended without all parts.

        :param unfinished: a reducer, this member or one that said so, could not finish its parts
        """
        self._stuck = True
        if unfinished and self.status is Status.RUNNING:
            self.status = Status.BROKEN

    def asked(self, status: Status, now: float) -> Status:
        """Another member tells its status and asks for this one's."""
        # a question that waited while this member was frozen says nothing: who asked has given the result up since
        in_time = now < self.deadline + MARGIN / 2
        if self.status is Status.HELD and (status is Status.COMMITTED or (status is Status.HELD and in_time)):
            self.status = Status.COMMITTED
        elif self.status is Status.RUNNING and status is Status.BROKEN:
            self.status = Status.BROKEN
        return self.status

    def answered(self, peer: str, status: Status | None) -> None:
        """What `peer` answered; None: it did not.

        Who is asked by a holder counts the result before it answers. So only that answer counts: one of a mere holder
        is from before the asker held it too, or came too late.
        """
        self._answers[peer] = status
        if status in (Status.HELD, Status.COMMITTED) and self.status is Status.RUNNING and peer not in self.helpers:
            self.helpers.append(peer)
        if self.status is Status.HELD and status is Status.COMMITTED:
            self.status = Status.COMMITTED
        elif self.status is Status.RUNNING and status is Status.BROKEN:
            self.status = Status.BROKEN

    def questions(self, now: float) -> list[str]:
        """Members to ask now: for a result that is not here, or for a second holder of one that is."""
        if self.decided or (self.status is Status.RUNNING and not self._stuck and now < self.deadline):
            return []
        due = [
            peer
            for peer in self._others
            if now - self._asked.get(peer, float("-inf"))
            >= (ASK_AGAIN if self._answers.get(peer, Status.RUNNING) is not None else ASK_AGAIN_SILENT)
        ]
        self._asked.update(dict.fromkeys(due, now))
        return due

    def poll(self, now: float) -> None:
        """Give up where nothing can come of it any more."""
        if self.decided:
            return
        gave_up = [self._answers.get(peer) is Status.ABANDONED for peer in self._others]
        if self.status is Status.RUNNING and not self._stuck and now < self.deadline:
            return
        if (gave_up and all(gave_up)) or (
            now >= self.deadline + MARGIN
            and not any(self._answers.get(peer) in (Status.HELD, Status.COMMITTED) for peer in self._others)
        ):
            self.status = Status.ABANDONED
        elif now >= self.deadline + 2 * MARGIN:
            self.status = Status.ABANDONED  # somebody holds it, and it cannot be fetched: the round is fetched later
