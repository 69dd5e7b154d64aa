"""The coordinator at work: welcomes peers, collects their reports into the ledger, keeps checkpoints.

The engine takes part in the averaging without gradients of its own, and keeps the replica up to date. Three threads go
with it: `save` writes checkpoints, `collect` enters reports into the ledger and looks for milestones, `evaluate` has
checkpoints measured on held-out text; and a fourth, `mirror`, where the curves are wanted at Weights & Biases. The web
server's threads ask for the status.
"""

import ipaddress
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from kantha import __version__
from kantha.api import RemoteFile, RunDescription, Snapshot
from kantha.coordinator.admission import Admission, SignIn
from kantha.coordinator.allowlist import Allowlist
from kantha.coordinator.bulletin import Bulletin
from kantha.coordinator.database import open_database
from kantha.coordinator.evaluator import Evaluator
from kantha.coordinator.leaderboard import Leaderboard
from kantha.coordinator.ledger import Ledger, RunTotals
from kantha.coordinator.milestones import Milestones
from kantha.coordinator.mirror import Mirror
from kantha.coordinator.notifier import Notifier
from kantha.coordinator.polls import Polls
from kantha.coordinator.rundir import TOKENIZER_FILE, RunDirectory
from kantha.coordinator.status import HELDOUT_TOLD, ROUNDS_TOLD, HeldoutStatus, RoundStatus, RunStatus, VolunteerStatus
from kantha.digests import digest_of
from kantha.errors import (
    DigestError,
    OrderError,
    PortTakenError,
    RunDirectoryError,
    StorageError,
    SwarmError,
    printable,
)
from kantha.swarm.guard import Guard
from kantha.swarm.membership import RENEWAL
from kantha.swarm.node import Node
from kantha.swarm.reports import Report, RoundReport
from kantha.swarm.rounds_engine import RoundsEngine
from kantha.training import Replica
from kantha.training.checkpoint import (
    MANIFEST,
    checkpoint_folder,
    drop_old_checkpoints,
    list_checkpoints,
    read_manifest,
)

_COLLECT_SECONDS = 1.5
_SAVE_SECONDS = 0.2  # between two looks whether a checkpoint is due
_JOIN_SECONDS = 10.0  # for a thread to end
_ROUNDS_AHEAD = 1_000  # rounds that volunteers may have finished while the coordinator was cut off
_NOTICE_SECONDS = 1.0  # between two looks whether the swarm has to be told something
_STORAGE_RETRY = 30.0  # seconds until a full disk is tried again
_STATUS_SECONDS = 1.0  # a status is made anew at most this often
_THIN_SECONDS = 3600.0  # between two times that old contributions are dropped
_PROBLEM = (
    "The run's records cannot be {} right now: its disk is full, or its database does not answer. Training goes on; "
    "what volunteers do meanwhile is entered as soon as that is mended."
)
_log = logging.getLogger(__name__)


_NOTHING = RunTotals(rounds=0, samples=0, failed=0, seconds=0.0, waited=0.0, people=0)


@dataclass(frozen=True)
class _Known:
    """What a status tells of the ledger."""

    totals: RunTotals = _NOTHING
    rounds: Sequence[RoundStatus] = ()
    heldout: Sequence[HeldoutStatus] = ()
    samples: Mapping[str, int] = field(default_factory=dict)  # of who is here, by peer id
    owners: Mapping[str, int | None] = field(default_factory=dict)  # their numbers, by peer id
    shown: Mapping[int, str] = field(default_factory=dict)  # names of those who want to be shown, by number


class Coordinator:
    """One served run. Made in the main thread: it forks the swarm's processes."""

    def __init__(
        self,
        run: RunDirectory,
        host: str,
        p2p_port: int,
        address: str,
        say: Callable[[str], None],
        sign_in: SignIn = "local",
        wandb: str | None = None,
    ) -> None:
        """
        :param host: IP address that the swarm listens on
        :param address: the run's link
        :param say: told in a sentence what happens
        :param wandb: the project at Weights & Biases that the run's curves are mirrored to
        :raises PortTakenError: when the swarm's port is in use
        :raises DigestError: when no checkpoint of the run is whole
        """
        self.run = run
        self.address = address
        self._say = say
        self._notifier = Notifier(run.keys, address, run.spec.name, say)
        self.sign_in: SignIn = sign_in
        self._wandb = wandb
        self._open_books()
        self._here: dict[str, str] = {}  # who was here when we last looked, for what is said
        # by leavers, for a round that is not finished yet; by peer and round, since a report repeats its rounds
        self._handed_in: dict[tuple[str, int], RoundReport] = {}
        self._status: tuple[float, RunStatus] | None = None
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._replica = Replica(run.spec)
        self.resumed_from = self._load_newest_checkpoint()
        self._checkpoint_round = self._replica.round
        self._order_written: float | None = None  # when the order that was read was written
        self._said_annealed: float | None = self._replica.schedule_state.annealed
        self._no_save_before = 0.0  # time.monotonic() until which a full disk is left alone
        try:
            identity = run.identity
            self._node = Node(
                identity,
                Guard(self.admission.trust(), self.admission.averager_certificate(identity.peer_id)),
                listen=[f"/ip{ipaddress.ip_address(host).version}/{host}/tcp/{p2p_port}"],
            )
        except SwarmError as error:
            raise PortTakenError(
                f"the swarm cannot use TCP port {p2p_port} of {host} ({error}); try --p2p-port"
            ) from None
        self._engine = RoundsEngine(
            self._node,
            run.spec.swarm,
            self._replica.parameters,
            self._replica.optimizer,
            self._replica.schedule,
            self._replica.round,
            lineage=self._replica.lineage,
            schedule_state=self._replica.schedule_state,
            role="averager",
            folder=run.path / "swarm",
        )
        self._engine.complete = _describe_itself
        self._addresses = self._node.addresses()
        self.failure: Exception | None = None
        self.on_failure: Callable[[], None] = lambda: None
        # daemons: a second Ctrl-C must end the program even while one of them waits for an averaging
        self._threads = [
            threading.Thread(target=self._guarded, args=(work,), name=work.__name__, daemon=True)
            for work in (self._save, self._collect, self._evaluate, *([self._mirror] if wandb else []))
        ]

    def _open_books(self) -> None:
        """All that is known of people and what they did, in one file."""
        database = open_database(self.run)
        self.ledger = Ledger(database)
        self.allowlist = Allowlist(database, self._notifier.tell, accounts_key=self.run.accounts_key())
        key, changes = self.run.key(), self.run.key_changes()
        self.leaderboard = Leaderboard(self.ledger, self.allowlist, self.run.spec)
        self.admission = Admission(database, self.run.spec, key, self.sign_in, self.allowlist, changes=changes)
        self.bulletin = Bulletin(database)
        self.polls = Polls(database, self.allowlist, self.sign_in)
        self.admission.restart()
        self._key_changed = self.run.key_changed()
        goal = self.run.spec.schedule.goal_samples
        self.milestones = Milestones(self.ledger, goal, self._notifier.announce, self.polls.all)
        self._look_after = 0.0  # time.monotonic() until which nobody looks for a new key, or a new notice
        self._certify_after = 0.0  # time.monotonic() until which the coordinator's own certificate is good enough
        self._told = ""  # the notice that the swarm was told
        self._said_paused = ""  # why the run is paused, as it was said last
        self._known = _Known()  # what the ledger said last
        self._members: dict[str, str] = {}  # usernames by peer id, as the ledger said last
        self._unentered = ""  # why the ledger did not take an entry; empty: it took all
        self._refusals = 0  # entries that it did not take
        self._thin_after = 0.0  # time.monotonic() until which nothing is thinned

    def start(self) -> None:
        self._notifier.start()
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """End the threads, save what is newer than the newest checkpoint, leave the swarm."""
        self._stop.set()
        for thread in self._threads:
            thread.join(timeout=_JOIN_SECONDS)
        self._engine.leave()
        self._save_if_newer()
        self._engine.say_goodbye()
        self._engine.close()
        self._node.close()
        self._notifier.close()
        self.ledger.close()

    def _guarded(self, work: Callable[[], None]) -> None:
        """A thread that fails must not leave a coordinator behind that only looks alive: end the program."""
        try:
            work()
        except Exception as error:  # noqa: BLE001  raised again by `serve`, in the main thread
            _log.exception("the thread %s failed", work.__name__)
            self.failure = error
            self.on_failure()

    # ---- the swarm

    def _load_newest_checkpoint(self) -> int:
        for folder in list_checkpoints(self.run.checkpoints):
            try:
                self._replica.load(folder)
            except DigestError as error:
                _log.error("skipped a checkpoint: %s", error)
            else:
                return self._replica.round
        raise RunDirectoryError(f"{self.run.checkpoints}: no whole checkpoint; restore one from a copy")

    def _save(self) -> None:
        checkpoint_rounds = self.run.spec.swarm.checkpoint_rounds
        while not self._stop.wait(_SAVE_SECONDS):
            self._engine.raise_if_failed()
            self._take_up_order()
            self._publish_notice()
            newer = self._engine.round - self._checkpoint_round
            # when the last volunteer has left, what it did must not be lost
            is_last = self._engine.schedule_state.is_finished or not self._engine.roster.present("trainer")
            if newer >= checkpoint_rounds or (newer > 0 and is_last):
                self._save_if_newer()
            self._say_how_annealing_goes()

    def _take_up_order(self) -> None:
        """Look for an order that `kantha anneal` left in the run's folder."""
        try:
            written = self.run.order.stat().st_mtime
        except FileNotFoundError:
            return
        if written == self._order_written:
            return
        self._order_written = written
        try:
            order = self.run.read_order()
        except OrderError as error:
            self._say(str(error))
            return
        if order is not None:
            self._save_if_newer()  # so that the run can go on from just before
            self._engine.give_order(order)

    def _publish_notice(self) -> None:
        """Tell the swarm whose certificates are revoked and what the run's key is, where that is news; and stay a
        member of it."""
        if time.monotonic() < self._look_after:
            return
        self._look_after = time.monotonic() + _NOTICE_SECONDS
        try:
            self._take_up_key()
            self.polls.close_due()
            notice = self.admission.notice()
        except (StorageError, RunDirectoryError) as error:
            self._look_after = time.monotonic() + _STORAGE_RETRY
            self._say(f"{error}; it is tried again in {_STORAGE_RETRY:.0f} s")
            return
        if notice != self._told:
            self._node.take_notice(notice)
            self._told = notice
            self._say_whether_paused()
        if time.monotonic() >= self._certify_after:
            self._node.set_certificate(self.admission.averager_certificate(self._node.peer_id))
            self._certify_after = time.monotonic() + RENEWAL

    def _say_whether_paused(self) -> None:
        pause = self.bulletin.paused()
        paused = pause.reason if pause is not None else ""
        if paused != self._said_paused:
            self._said_paused = paused
            self._say(
                f"the run is paused: {printable(paused)}; volunteers stop computing" if paused else "the run goes on"
            )

    def _take_up_key(self) -> None:
        """Look for a key that `kantha rotate-key` drew."""
        changed = self.run.key_changed()
        if changed == self._key_changed:
            return
        self.admission.rotate(self.run.key(), self.run.key_changes())
        self._key_changed = changed
        self._order_written = None  # the order is signed by the new key, too
        self._certify_after = 0.0
        self._say("the run has a new key; members get new certificates when they renew them, within a minute")

    def _say_how_annealing_goes(self) -> None:
        state, before = self._engine.schedule_state, self._said_annealed
        if state.annealed == before:
            return
        self._said_annealed = state.annealed
        if state.annealed is None:
            self._say("annealing was taken back: the learning rate is at its peak again")
        elif before is None:
            self._say(f"round {self._engine.round}: annealing began, over {state.anneal_samples:,} samples")
        if state.is_finished:
            self._say(
                f"round {self._engine.round}: the run is annealed and finished, volunteers are thanked and leave; "
                f"`kantha publish {self.run.path} OWNER/NAME` puts the model on the hub"
            )

    def _save_if_newer(self) -> None:
        if time.monotonic() < self._no_save_before:
            return
        with self._engine.hold():
            self._save_replica()

    def _save_replica(self) -> None:
        number = self._engine.round
        if number <= self._checkpoint_round or not self._engine.is_ready:
            return
        if not self._replica.is_finite():
            self._no_save_before = time.monotonic() + _STORAGE_RETRY
            self._say(
                f"round {number}: the weights are not finite, they are not saved; the checkpoint of round "
                f"{self._checkpoint_round} is good: stop all volunteers and the coordinator, and start from there"
            )
            return
        try:
            self.run.save_checkpoint(self._replica, number, self._engine.lineage, self._engine.schedule_state)
            self._checkpoint_round = number
            drop_old_checkpoints(self.run.checkpoints)
            self._say(f"round {number}: checkpoint saved")
        except StorageError as error:
            self._no_save_before = time.monotonic() + _STORAGE_RETRY
            self._say(f"{error}; it is tried again in {_STORAGE_RETRY:.0f} s")

    def _enter(self, entry: Callable[[], object]) -> bool:
        """Make an entry in the ledger; a disk that is full is said once until it has room, and does not end the run."""
        try:
            entry()
        except StorageError as error:
            if str(error) != self._unentered:
                self._say(str(error))
            self._unentered = str(error)
            self._refusals += 1
            return False
        return True

    def _evaluate(self) -> None:
        try:
            Evaluator(self.run, self.ledger, lambda: self._checkpoint_round, self._say).work_until(self._stop)
        except Exception as error:  # noqa: BLE001  a run goes on without this curve, whatever happens to it
            _log.exception("the evaluator failed")
            self._say(f"held-out text is not measured any more ({error!r}; {self.run.log} says more)")

    def _mirror(self) -> None:
        try:
            Mirror(self.run, self.ledger, self._wandb or "", self._say).work_until(self._stop)
        except Exception as error:  # noqa: BLE001  a run goes on without its mirror, whatever happens to it
            _log.exception("the mirror failed")
            self._say(f"nothing is mirrored to Weights & Biases any more ({error!r}; {self.run.log} says more)")

    def _look_for_milestones(self) -> None:
        try:
            self.milestones.look(self._engine.schedule_state)
        except StorageError as error:  # the next look is at all of it; and who has the ledger's troubles says them
            _log.warning("%s", error)

    # ---- reports

    def _collect(self) -> None:
        pending: dict[str, Report] = {}  # by peer, what is not in the ledger yet
        known: dict[str, float] = {}  # when each peer's newest report was made
        results: dict[int, str] = {}  # that are in the ledger, by round: the lineage after it
        while not self._stop.wait(_COLLECT_SECONDS):
            try:
                reports = self._node.reports()
            except SwarmError as error:
                _log.warning("%s", error)
                continue
            refusals = self._refusals
            members = self._read_members()
            reports = {peer: report for peer, report in reports.items() if peer in members}
            for peer, report in reports.items():
                if known.get(peer) != report.time:
                    known[peer] = report.time
                    pending[peer] = _with_rounds_of(report, pending.get(peer))
            present = {peer: seen for peer, seen in self._engine.roster.present("trainer").items() if peer in reports}
            if present and not self._here:
                # a swarm that starts anew from a checkpoint does the rounds after it again; a newcomer that still loads
                # the state says round 0, which is no reason to forget what this replica has
                newest = max(self._engine.round, *(report.round for report, _ in present.values()))
                self._enter(partial(self.ledger.forget_rounds_after, newest))
            for number, lineage in dict(self._engine.lineages).items():
                shares = self._engine.shares.get(number)
                rate = self._engine.learning_rates.get(number)
                if (
                    shares is not None
                    and results.get(number) != lineage
                    and self._enter(partial(self.ledger.add_result, number, lineage, shares, rate))
                ):
                    results[number] = lineage
            for peer_id in sorted(pending):
                if not self._enter(partial(self._add_report, peer_id, pending[peer_id])):
                    break
                del pending[peer_id]
            for peer_id, number in [each for each in self._handed_in if each[1] <= self._engine.round]:
                if self._enter(partial(self.ledger.add_rounds, peer_id, [self._handed_in[peer_id, number]])):
                    del self._handed_in[peer_id, number]
            self._enter(self.ledger.stand_in)
            if time.monotonic() >= self._thin_after:
                self._thin_after = time.monotonic() + _THIN_SECONDS
                self._enter(self.ledger.thin)
            if self._refusals == refusals:
                self._unentered = ""
            self._say_who_is_here({peer: members[peer] for peer in present})
            self._look_for_milestones()

    def _read_members(self) -> dict[str, str]:
        """Who is a member, by peer id; while the ledger cannot be read, who was one before."""
        try:
            self._members = self.ledger.members()
        except StorageError as error:
            _log.warning("%s", error)
        return self._members

    def _present(self) -> dict[str, tuple[Report, float]]:
        """Members that train now."""
        members = self._read_members()
        return {peer: seen for peer, seen in self._engine.roster.present("trainer").items() if peer in members}

    def _add_report(self, peer_id: str, report: Report) -> None:
        """Enter a peer's last rounds. Whoever claims a later one than anybody can have finished is not believed, and a
        round counts with the result that this replica has of it: another one may come of a network that fell apart."""
        newest, lineages = self._engine.round + _ROUNDS_AHEAD, self._engine.lineages
        rounds = [
            entry
            for entry in report.rounds
            if entry.round <= newest and entry.lineage in ("", lineages.get(entry.round, entry.lineage))
        ]
        # what a leaver handed in counts when the others have finished the round
        self._handed_in |= {(peer_id, entry.round): entry for entry in rounds if not entry.lineage}
        self.ledger.add_rounds(peer_id, [entry for entry in rounds if entry.lineage])
        self.ledger.set_device(peer_id, report.device)
        for failed in report.failed:
            if failed.round <= newest:
                self.ledger.mark_failed(failed.round, failed.reason)

    def _say_who_is_here(self, now: dict[str, str]) -> None:
        for peer_id, name in now.items():
            if peer_id not in self._here:
                self._say(f"{name} joined ({len(now)} here now)")
        for peer_id, name in self._here.items():
            if peer_id not in now:
                self._say(f"{name} is gone ({len(now)} here now)")
        self._here = now

    # ---- what the web service answers

    def describe(self) -> RunDescription:
        tokenizer = self.run.tokenizer_digest()
        folder = list_checkpoints(self.run.checkpoints)[0]
        manifest = read_manifest(folder)
        where = f"api/v1/checkpoints/{manifest.round}"
        files = {MANIFEST: digest_of(folder / MANIFEST), **manifest.files}
        return RunDescription(
            version=__version__,
            fingerprint=self.run.spec.fingerprint,
            spec=self.run.spec.model_dump(mode="json"),
            public_key=self.admission.public_key,
            notice=self.admission.notice(),
            sign_in=self.sign_in,
            bootstrap=self._addresses,
            tokenizer=RemoteFile(path=f"api/v1/{TOKENIZER_FILE}", **tokenizer.model_dump()),
            snapshot=Snapshot(
                round=manifest.round,
                files={name: RemoteFile(path=f"{where}/{name}", **file.model_dump()) for name, file in files.items()},
            ),
        )

    def checkpoint_file(self, round_number: int, name: str) -> str | None:
        """Path of a file of a checkpoint; None where there is no such file."""
        folder = checkpoint_folder(self.run.checkpoints, round_number)
        try:
            return str(folder / name) if name in {MANIFEST, *read_manifest(folder).files} else None
        except (DigestError, OSError):
            return None

    def status(self) -> RunStatus:
        with self._lock:
            if self._status is not None and time.monotonic() - self._status[0] < _STATUS_SECONDS:
                return self._status[1]
        status = self._make_status()
        with self._lock:
            self._status = (time.monotonic(), status)
        return status

    def _read_ledger(self, peers: Sequence[str]) -> tuple[_Known, str]:
        """What the ledger says now, or said last where it cannot be asked; and what is wrong with it, for the page.

        :param peers: who is here
        """
        try:
            self._known = _Known(
                totals=self.ledger.totals(),
                rounds=self.ledger.last_rounds(ROUNDS_TOLD),
                heldout=self.ledger.heldout(HELDOUT_TOLD),
                samples=self.ledger.samples_by_peer(peers),
                owners=self.ledger.people_of_peers(),
                shown=self.allowlist.shown(),
            )
        except StorageError as error:
            _log.warning("%s", error)
            return self._known, _PROBLEM.format("read")
        return self._known, _PROBLEM.format("written") if self._unentered else ""

    def _make_status(self) -> RunStatus:
        spec, present = self.run.spec, self._present()
        known, problem = self._read_ledger(list(present))
        totals = known.totals
        number = self._engine.round
        in_round = sum(report.samples for report, _ in present.values() if report.round >= number)
        speed = sum(report.samples_per_second for report, _ in present.values())
        remaining = max(0, self._engine.target - in_round)
        return RunStatus(
            name=spec.name,
            goal=spec.goal,
            goal_samples=spec.schedule.goal_samples,
            fingerprint=spec.fingerprint,
            address=self.address,
            round=number,
            target_batch_size=self._engine.target,
            samples_in_round=in_round,
            samples=totals.samples,
            samples_per_second=speed,
            seconds_to_next_round=remaining / speed if speed > 0 else None,
            failed_rounds=totals.failed,
            computing_share=totals.computing_share,
            checkpoint_round=self._checkpoint_round,
            paused=pause.reason if (pause := self.bulletin.known()[1]) is not None else "",
            learning_rate=self._engine.learning_rate,
            annealed=self._engine.schedule_state.annealed,
            volunteers=sorted(
                (
                    _volunteer(peer_id, *self._shown(peer_id), known.samples.get(peer_id, 0), report, silent)
                    for peer_id, (report, silent) in present.items()
                ),
                key=lambda volunteer: (volunteer.name or "", volunteer.peer_id),
            ),
            heldout=list(known.heldout),
            rounds=list(known.rounds),
            problem=problem,
        )

    def _shown(self, peer_id: str) -> tuple[str | None, int | None]:
        """Name and number of a peer's owner, for everybody; None where that person is not shown."""
        number = self._known.owners.get(peer_id)
        if number is None:  # who was a member before people had numbers is in the ledger by name alone
            return self._members.get(peer_id) or None, None
        name = self._known.shown.get(number)
        return name, number if name is not None else None


def _describe_itself(report: Report) -> Report:
    return report.copy(update={"state": "averaging", "device": "coordinator"})


def _with_rounds_of(report: Report, before: Report | None) -> Report:
    """A report that also has the rounds of one before it, which could not be entered."""
    if before is None:
        return report
    rounds = {(entry.round, bool(entry.lineage)): entry for entry in (*before.rounds, *report.rounds)}
    failed = {entry.round: entry for entry in (*report.failed, *before.failed)}
    return report.copy(update={"rounds": list(rounds.values()), "failed": list(failed.values())})


def _volunteer(
    peer_id: str, name: str | None, number: int | None, samples: int, report: Report, silent: float
) -> VolunteerStatus:
    loss = None
    if report.rounds and (done := report.rounds[-1]).samples:
        loss = (done.mlm_loss_sum + done.sop_loss_sum) / done.samples
    return VolunteerStatus(
        name=name,
        number=number,
        peer_id=peer_id,
        state=report.state,
        round=report.round,
        samples_in_round=report.samples,
        samples=samples,
        samples_per_second=report.samples_per_second,
        loss=loss,
        device=report.device,
        seconds_since_seen=silent,
    )
