"""`kantha export` and `kantha publish`: a run's model with what its ledger knows, as a folder and on the hub."""

import shlex
from collections.abc import Callable, Sequence
from pathlib import Path

from kantha.coordinator.allowlist import Allowlist
from kantha.coordinator.database import Database, has_records, open_database
from kantha.coordinator.ledger import Ledger
from kantha.coordinator.polls import NAME_POLL, Polls, PollState
from kantha.coordinator.rundir import RUN_FILE, RunDirectory
from kantha.publishing import (
    Contributor,
    HeldoutLoss,
    NamePoll,
    RoundLoss,
    Score,
    TrainingFacts,
    check_publishing,
    export_model,
    find_checkpoint,
    load_scores,
    upload_model,
)
from kantha.training.checkpoint import read_manifest


def export_run(
    source: Path, out: Path, scores: Sequence[Score] = (), repository: str | None = None, replace: bool = False
) -> int:
    """Write the model of a run (its newest checkpoint), or of one checkpoint folder, to `out`; returns its round.

    Raises as `find_checkpoint` and `export_model` do, and as `open_database` where the run's ledger cannot be read.
    """
    checkpoint = find_checkpoint(source)  # once: a run that is being served makes new ones
    run = _run_with_records(source)
    facts = training_facts(run, read_manifest(checkpoint).round) if run is not None else None
    return export_model(checkpoint, out, facts, scores, repository, replace)


def _run_with_records(source: Path) -> RunDirectory | None:
    """None for a checkpoint, and for a run that was never served."""
    if not (source / RUN_FILE).is_file():
        return None
    run = RunDirectory.open(source)
    return run if has_records(run) else None


def training_facts(run: RunDirectory, last_round: int) -> TrainingFacts:
    """What a run's ledger knows of the rounds that made the model of `last_round`. Raises as `open_database`."""
    ledger = Ledger(open_database(run))
    names = Allowlist(ledger.database).shown()
    try:
        rounds = [entry for entry in ledger.rounds() if entry.round <= last_round]
        heldout = [entry for entry in ledger.heldout() if entry.round <= last_round]
        people = ledger.people(last_round)
        failures = ledger.failures()
        devices = ledger.seconds_by_device(last_round)
        name_poll = _name_poll(ledger.database)
    finally:
        ledger.close()
    computing = sum(person.seconds for person in people)
    present = computing + sum(person.waited for person in people)
    return TrainingFacts(
        losses=[
            RoundLoss(entry.round, entry.mlm_loss, entry.sop_loss)
            for entry in rounds
            if entry.mlm_loss is not None and entry.sop_loss is not None
        ],
        heldout=[
            HeldoutLoss(
                round=entry.round,
                mlm=entry.mlm_loss,
                sop=entry.sop_loss,
                mlm_accuracy=entry.mlm_accuracy,
                sop_accuracy=entry.sop_accuracy,
                pairs=entry.pairs,
            )
            for entry in heldout
        ],
        samples=sum(entry.samples for entry in rounds),
        failed_rounds=sum(number <= last_round for number in failures),
        began=rounds[0].finished if rounds else None,
        ended=rounds[-1].finished if rounds else None,
        computing_share=computing / present if present else None,
        seconds_by_device=devices,
        contributors=[
            Contributor(
                (person.username or None) if person.person is None else names.get(person.person),
                person.samples,
                person.seconds,
            )
            for person in people
        ],
        name_poll=name_poll,
    )


def _name_poll(database: Database) -> NamePoll | None:
    """None: it has not closed, or there was none."""
    polls = Polls(database, Allowlist(database), "local")
    poll = polls.poll(NAME_POLL)
    if poll is None or poll.state != PollState.CLOSED:
        return None
    return NamePoll([(entry.text, entry.votes) for entry in polls.entries(NAME_POLL)], poll.voters)


def publish_run(
    source: Path, repository: str, public: bool, out: Path | None, scores: Path | None, say: Callable[[str], None]
) -> None:
    """Write the model of a run or a checkpoint to a folder, and that to the hub.

    Raises `PublishingError` besides what `export_run` raises.
    """
    measured = load_scores(scores) if scores else []
    check_publishing(repository)
    folder = out or source / "published"
    round_number = export_run(source, folder, measured, repository, replace=True)
    say(f"wrote {folder}, the model after round {round_number}; its card is {folder / 'README.md'}")
    if _run_with_records(source) is None:
        say(
            f"{source} is a checkpoint without a ledger: the card names no contributors; give the run's folder for that"
        )
    url = upload_model(folder, repository, public, f"The model after round {round_number}", say)
    say(f"published: {url} ({'public' if public else 'only you and your organization can see it'})")
    if not public:
        again = ["kantha", "publish", str(source), repository, "--public"]
        again += ["--out", str(out)] if out else []
        again += ["--scores", str(scores)] if scores else []
        say(f"Next: look at its card there. To show it to everybody: {shlex.join(again)}")
