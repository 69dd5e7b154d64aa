"""The whole, with real processes: `kantha serve` and `kantha join`, killed and restarted."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from commands import Run, served, small_run, wait_for

from kantha.coordinator.ledger import Ledger
from kantha.coordinator.rundir import RunDirectory
from kantha.training import Replica
from kantha.training.checkpoint import list_checkpoints, read_manifest

pytestmark = [pytest.mark.swarm, pytest.mark.timeout(600)]


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    with served(tmp_path, small_run(tmp_path)) as run:
        yield run


@pytest.mark.slow
def test_a_swarm_survives_the_death_of_a_volunteer_and_of_its_coordinator(run: Run) -> None:
    coordinator = run.serve()
    page, port = run.url, int(run.url.rsplit(":", 1)[1])
    first, second = run.join("Asha"), run.join("Rafiq")
    run.wait_for_volunteer("Asha", 90)
    run.wait_for_volunteer("Rafiq", 60)

    # kill -9 of a volunteer costs at most one round
    before = run.wait_for_round(3, 60)
    second.kill()
    after = run.wait_for_round(
        before.round + 3, 150
    )  # seconds: the dead peer's word counts for 20, an averaging for 20
    assert after.failed_rounds - before.failed_rounds <= 1, run.story()
    assert first.process.poll() is None

    # one that joins later takes part within a minute
    third = run.join("Mitu")
    run.wait_for_volunteer("Mitu", 60)

    # kill -9 of the coordinator: the volunteers go on, nothing is lost
    known = run.status()
    assert known is not None
    peer_id = run_peer_id(run)
    coordinator.kill()
    rounds_said = first.output().count("\nround ")
    wait_for(lambda: first.output().count("\nround ") >= rounds_said + 2, 90, f"rounds without it\n{run.story()}")
    run.serve(port)
    assert run.url == page
    assert run_peer_id(run) == peer_id
    again = run.wait_for_round(known.round + 3, 90)
    samples = {r.round: r.samples for r in again.rounds}  # reports of the newest round may still have been under way
    assert all(samples[r.round] >= r.samples for r in known.rounds)
    assert first.process.poll() is None
    assert third.process.poll() is None
    wait_for(
        lambda: (s := run.status()) and {v.name for v in s.volunteers} == {"Asha", "Mitu"}, 60, f"both\n{run.story()}"
    )

    # the rounds of its absence are in the ledger too, from the volunteers' reports
    wait_for(
        lambda: (s := run.status()) and [r.round for r in s.rounds] == list(range(1, s.rounds[-1].round + 1)),
        30,
        f"every round in the ledger\n{run.story()}",
    )
    assert first.leave() == 0, first.output()
    assert third.leave() == 0, third.output()
    assert "of your samples count" in first.output()


def run_peer_id(run: Run) -> str:
    return RunDirectory.open(run.run_dir).identity.peer_id


@pytest.mark.slow
def test_training_resumes_from_the_last_checkpoint_when_all_have_left(run: Run) -> None:
    coordinator = run.serve()
    volunteer = run.join("Asha")
    reached = run.wait_for_round(3, 120).round
    assert volunteer.leave() == 0, volunteer.output()
    # what the last volunteer did is saved when it is gone
    wait_for(lambda: (s := run.status()) and s.checkpoint_round >= reached, 60, f"a checkpoint\n{run.story()}")
    assert coordinator.leave() == 0, coordinator.output()
    saved = read_manifest(list_checkpoints(RunDirectory.open(run.run_dir).checkpoints)[0]).round

    run.serve()
    newcomer = run.join("Mitu")
    status = run.wait_for_round(saved + 2, 120)
    assert "downloading" not in newcomer.output()  # the state came from the swarm: from the coordinator's peer
    assert [r.round for r in status.rounds] == list(range(1, status.rounds[-1].round + 1)), run.story()
    ledger = Ledger(RunDirectory.open(run.run_dir).ledger)
    assert set(ledger.members().values()) == {"Asha", "Mitu"}
    ledger.close()


@pytest.mark.slow
def test_a_running_swarm_is_annealed_and_then_everybody_leaves(run: Run) -> None:
    coordinator = run.serve()
    port = int(run.url.rsplit(":", 1)[1])
    volunteers = [run.join("Asha"), run.join("Rafiq")]
    run.wait_for_volunteer("Rafiq", 90)
    wait_for(lambda: (s := run.status()) and s.checkpoint_round >= 2, 60, f"a checkpoint\n{run.story()}")
    organizer = run.start("organizer", "anneal", str(run.run_dir), "--samples", "30000")
    assert organizer.process.wait(60) == 0, organizer.output()
    wait_for(lambda: (s := run.status()) and s.annealed is not None, 60, f"the order is followed\n{run.story()}")
    # who is left waits for a coordinator that is away when the run ends, so that the end is not lost
    coordinator.kill()
    for volunteer in volunteers:
        wait_for(lambda v=volunteer: "the run is finished" in v.output(), 120, f"the end\n{run.story()}")
        assert volunteer.process.poll() is None
    run.serve(port)
    wait_for(lambda: (s := run.status()) and s.annealed == 1, 90, f"the coordinator has the end\n{run.story()}")
    for volunteer in volunteers:
        wait_for(lambda v=volunteer: v.process.poll() is not None, 60, f"{volunteer.name} leaves\n{run.story()}")
        assert volunteer.process.returncode == 0
    end = run.status()
    assert end is not None
    assert end.learning_rate == 0
    wait_for(lambda: (s := run.status()) and s.checkpoint_round == s.round, 30, f"the last checkpoint\n{run.story()}")
    checkpoints = list_checkpoints(RunDirectory.open(run.run_dir).checkpoints)
    states = [read_manifest(checkpoint).schedule for checkpoint in checkpoints]
    assert states[0].is_finished
    assert states[-1].annealed is None, "one from before is kept"
    # who comes too late is told, and does not train on
    late = run.join("Mitu")
    wait_for(lambda: late.process.poll() is not None, 120, f"Mitu leaves\n{run.story()}")
    assert late.process.returncode == 0
    assert "the run is finished" in late.output()
    again = run.status()
    assert again is not None
    assert again.round == end.round


@pytest.mark.slow
def test_volunteers_that_nobody_can_dial_train_through_the_coordinator(run: Run) -> None:
    run.serve()
    run.join("Asha", "--outbound-only")
    run.join("Rafiq", "--outbound-only")
    run.wait_for_volunteer("Asha", 90)
    run.wait_for_volunteer("Rafiq", 60)
    start = run.wait_for_round(3, 60)
    late = run.join("Mitu", "--outbound-only")
    run.wait_for_volunteer("Mitu", 60)
    end = run.wait_for_round(start.round + 4, 90)
    assert end.failed_rounds <= 1, run.story()
    wait_for(lambda: (s := run.status()) and any(r.volunteers == 3 for r in s.rounds), 60, f"all three\n{run.story()}")
    assert end.checkpoint_round > 0
    assert late.leave() == 0, late.output()


@pytest.mark.slow
def test_a_volunteer_that_is_alone_has_whole_rounds_and_its_end_does_not_spoil_the_checkpoint(run: Run) -> None:
    run.serve()
    alone = run.join("Asha")
    status = run.wait_for_round(5, 120)
    assert status.failed_rounds == 0, run.story()
    # all leave at once, in the middle of whatever they do; what is saved must still be a model
    other = run.join("Rafiq")
    run.wait_for_volunteer("Rafiq", 90)
    for volunteer in (alone, other):
        volunteer.process.terminate()
    assert alone.process.wait(timeout=90) == 0, alone.output()
    assert other.process.wait(timeout=90) == 0, other.output()
    wait_for(lambda: (s := run.status()) and not s.volunteers, 60, f"nobody is here\n{run.story()}")
    spec = RunDirectory.open(run.run_dir)
    replica = Replica(spec.spec)
    replica.load(list_checkpoints(spec.checkpoints)[0])
    assert all(bool(p.isfinite().all()) for p in replica.parameters)
    assert ", 2 peers (" in alone.output(), run.story()


@pytest.mark.slow
def test_who_is_killed_before_it_can_report_a_round_has_credit_for_it(run: Run) -> None:
    run.serve()
    alone = run.join("Asha")
    run.wait_for_volunteer("Asha", 90)
    before = run.status()
    assert before is not None
    reached = run.wait_for_round(before.round + 1, 60).round
    alone.kill()  # the coordinator has the round's result; the report of it comes up to 3 s later
    wait_for(
        lambda: (s := run.status()) and [r.round for r in s.rounds] == list(range(1, s.round + 1)),
        60,
        f"every round in the ledger\n{run.story()}",
    )
    end = run.status()
    assert end is not None
    assert end.round >= reached
    assert all(r.samples > 0 for r in end.rounds)


@pytest.mark.slow
@pytest.mark.parametrize("whose", ["volunteer", "coordinator"])
def test_who_loses_its_swarm_process_starts_itself_again(run: Run, free_port: int, whose: str) -> None:
    coordinator = run.serve(free_port)
    volunteer = run.join("Asha")
    run.wait_for_volunteer("Asha", 90)
    program = {"volunteer": volunteer, "coordinator": coordinator}[whose]
    killed = [process for process in program.family() if process.name() == "p2pd"]
    assert killed
    for process in killed:
        process.kill()
    wait_for(lambda: "starting again" in program.output(), 60, f"it starts again\n{run.story()}")
    reached = run.wait_for_round(1, 60).round
    run.wait_for_round(reached + 2, 120)
    assert coordinator.process.poll() is None
    assert volunteer.process.poll() is None
    assert volunteer.leave() == 0, volunteer.output()
