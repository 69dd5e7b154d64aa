"""`kantha demo`: a coordinator and volunteers on this machine, each a process of its own, started by the same commands
that strangers use; a live picture of the whole; and a model at the end."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from pydantic import ValidationError
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.padding import Padding
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table

from kantha.cli.publish import export_run
from kantha.coordinator.annealing import anneal_run
from kantha.coordinator.database import open_database
from kantha.coordinator.ledger import Ledger
from kantha.coordinator.rundir import RunDirectory
from kantha.coordinator.status import RunStatus
from kantha.corpus import Batch, heldout_batches, heldout_sentences, load_tokenizer
from kantha.errors import DemoError, StorageError
from kantha.evaluation import fill_masks, heldout_loss
from kantha.spec import PRESETS
from kantha.swarm.processes import signal_when_parent_dies
from kantha.training import Replica
from kantha.training.checkpoint import list_checkpoints
from kantha.volunteer.folders import samples_given

_NAMES = ("Asha", "Rafiq", "Mitu", "Karim", "Nila", "Bijoy", "Shirin", "Tanvir")
_START_SECONDS = 120.0  # for the coordinator to answer
_HELDOUT_EXAMPLES = 512
_FILL_MASK_EXAMPLES = 5
_ANNEALED_SHARE = 0.3  # of the time


@dataclass(frozen=True)
class _Child:
    """A started command, and where its output goes."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path

    def last_words(self) -> str:
        lines = self.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return lines[-1] if lines else "it said nothing"


def run_demo(
    volunteers: int, minutes: float, out: Path | None, report: Path | None, port: int, preset: str, console: Console
) -> None:
    """Run the demo. Raises `DemoError` where a process of it fails; nothing is left running in any case."""
    began = time.monotonic()
    out = out if out is not None else _new_folder()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise StorageError(f"{out}: exists already and is not empty; choose another folder with --out")
    try:
        out.mkdir(parents=True, exist_ok=True)
        if report is not None:
            report.open("a").close()  # better found out now than when all is done
    except OSError as error:
        raise StorageError(
            f"{error.filename or out}: cannot be written ({error.strerror}); choose another place"
        ) from None

    def say(line: str) -> None:
        console.print(line, markup=False, soft_wrap=True)

    say(
        f"Kantha demo: {volunteers} volunteers train on this machine for {minutes:g} minutes; everything goes to {out}/"
    )
    run = RunDirectory.create(out / "run", PRESETS[preset], say)
    heldout = heldout_batches(
        run.spec, load_tokenizer(run.tokenizer, run.spec.tokenizer.sha256), _HELDOUT_EXAMPLES, batch_size=32
    )
    # who is asked to leave first ends what is under way: gradients, then state, and each perhaps a second time
    patience = 4 * run.spec.swarm.averaging_timeout + 30
    with _children(patience, say) as start:
        coordinator = start("coordinator", out, ["serve", str(run.path), "--port", str(port)])
        url = _wait_for_page(coordinator)
        say(f"the run's page: {url}   (open it in a browser; `kantha join {url} --name YOU` joins)")
        say("measuring the untrained model on held-out text …")
        loss_before = _heldout_loss(run, heldout)
        threads = max(1, (os.cpu_count() or 1) // volunteers)
        people = [
            start(name, out, ["join", url, "--name", name, "--threads", str(threads)])
            for name in (_name(i) for i in range(volunteers))
        ]
        is_finished = _watch(url, coordinator, people, minutes * 60, run, console)
        say("the volunteers leave …")
        for child in people:
            if not is_finished:  # else they do so by themselves
                child.process.send_signal(signal.SIGTERM)
        failed = [child for child in people if not _ended_well(child, patience)]
        _wait_until_empty(url)
        coordinator.process.send_signal(signal.SIGTERM)
        if not _ended_well(coordinator, patience):
            failed.append(coordinator)
    say("measuring the trained model, exporting it …")
    loss_after = _heldout_loss(run, heldout)
    export_run(run.path, out / "model")
    figures = _figures(run, loss_before, loss_after, out, time.monotonic() - began)
    _show_result(figures, run, out, say)
    for path in {out / "report.json", report or out / "report.json"}:
        try:
            path.write_text(json.dumps(figures, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            raise StorageError(f"{path}: cannot be written ({error.strerror}); the model is in {out}") from None
    if failed:
        raise DemoError(
            "; ".join(f"{child.name} did not end well: {child.last_words()} ({child.log})" for child in failed)
        )


def _name(index: int) -> str:
    return _NAMES[index] if index < len(_NAMES) else f"Volunteer{index + 1}"


def _new_folder() -> Path:
    number = 1
    while (folder := Path("demo-run" if number == 1 else f"demo-run-{number}")).exists():
        number += 1
    return folder


@contextmanager
def _children(patience: float, say: Callable[[str], None]) -> Iterator[Any]:
    """A function that starts `kantha` commands; all of them have ended when the block is left, however it is left.

    :param patience: seconds that each gets to end by itself
    """
    started: list[_Child] = []

    def start(name: str, out: Path, arguments: Sequence[str]) -> _Child:
        log = out / "log" / f"{name}.log"
        log.parent.mkdir(exist_ok=True)
        with log.open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "kantha", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, "KANTHA_HOME": str(out.resolve() / "home"), "PYTHONUNBUFFERED": "1"},
                start_new_session=True,  # Ctrl-C is for the demo, which then ends its children in order
                preexec_fn=lambda: signal_when_parent_dies(signal.SIGTERM),
            )
        child = _Child(name, process, log)
        started.append(child)
        return child

    try:
        yield start
    finally:
        alive = [child for child in started if child.process.poll() is None]
        if alive:
            say(f"stopping {', '.join(child.name for child in alive)} …")
        for child in reversed(alive):
            child.process.send_signal(signal.SIGTERM)
        for child in reversed(alive):
            _ended_well(child, patience)


def _ended_well(child: _Child, patience: float) -> bool:
    """Wait for a process that was asked to end; kill it if it does not."""
    try:
        return child.process.wait(timeout=patience) == 0
    except subprocess.TimeoutExpired:
        child.process.kill()
        child.process.wait()
        return False


def _wait_for_page(coordinator: _Child) -> str:
    """The run's link, once it answers."""
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline:
        if coordinator.process.poll() is not None:
            raise DemoError(f"the coordinator did not start: {coordinator.last_words()} ({coordinator.log})")
        for line in coordinator.log.read_text(encoding="utf-8").splitlines():
            if line.startswith("the run's page: ") and _status(url := line.split()[-1]) is not None:
                return url
        time.sleep(0.2)
    raise DemoError(f"the coordinator did not answer within {_START_SECONDS:.0f} s ({coordinator.log})")


def _status(url: str) -> RunStatus | None:
    """The run's status; None while the coordinator does not answer."""
    try:
        # the coordinator is on this machine, where no proxy leads to
        return RunStatus.model_validate_json(httpx.get(f"{url}/api/v1/status", timeout=5.0, trust_env=False).content)
    except (httpx.TransportError, ValidationError):
        return None


def _watch(
    url: str, coordinator: _Child, people: Sequence[_Child], seconds: float, run: RunDirectory, console: Console
) -> bool:
    """Show the run until the time is up, or the run is finished (True): it is annealed in its last part.

    Raises `DemoError` where the coordinator ends, or all volunteers do before that.
    """
    status: RunStatus | None = None
    shown, ordered = -1, False
    deadline = time.monotonic() + seconds
    with Live(console=console, refresh_per_second=2, transient=True, auto_refresh=False) as live:
        while (left := deadline - time.monotonic()) > 0:
            if coordinator.process.poll() is not None:
                raise DemoError(f"the coordinator ended: {coordinator.last_words()} ({coordinator.log})")
            ended = [child for child in people if child.process.poll() is not None]
            status = _status(url) or status
            if status is not None and status.annealed == 1:
                console.print("the run is annealed to its end", markup=False)
                return True
            if len(ended) == len(people):
                raise DemoError(f"all volunteers ended; {ended[0].name}: {ended[0].last_words()} ({ended[0].log})")
            if not ordered and left < _ANNEALED_SHARE * seconds and status is not None and status.checkpoint_round:
                ordered = True
                samples = int(0.8 * left * status.samples_per_second)  # some time is for the word to go round
                anneal_run(run.path, max(1, samples), False, lambda _line: None)
                console.print(f"kantha anneal {run.path} --samples {samples}: the learning rate falls", markup=False)
            if console.is_terminal:
                live.update(_picture(status, people, url, left), refresh=True)
            elif status is not None:
                # not the newest: reports of that one may still be under way
                for done in (r for r in status.rounds[:-1] if r.round > shown):
                    shown = done.round
                    loss = "–" if done.loss is None else f"{done.loss:.3f}"
                    console.print(
                        f"round {done.round}: {done.volunteers} volunteers, {done.samples} samples, "
                        f"loss {loss}{' (failed)' if done.failed else ''}; {left:.0f} s left",
                        markup=False,
                    )
            time.sleep(1.0)
    return False


def _picture(status: RunStatus | None, people: Sequence[_Child], url: str, left: float) -> RenderableType:
    table = Table(expand=False, box=None, padding=(0, 2))
    for heading in ("volunteer", "state", "samples", "samples/s", "loss"):
        table.add_column(heading, justify="left" if heading in ("volunteer", "state") else "right")
    here = {volunteer.name: volunteer for volunteer in status.volunteers} if status else {}
    for child in people:
        volunteer = here.get(child.name)
        if volunteer is None:
            state = "starting …" if child.process.poll() is None else "ended"
            table.add_row(child.name, state, "", "", "")
        else:
            loss = "–" if volunteer.loss is None else f"{volunteer.loss:.3f}"
            total = volunteer.samples + volunteer.samples_in_round
            table.add_row(
                escape(child.name), escape(volunteer.state), str(total), f"{volunteer.samples_per_second:.1f}", loss
            )
    clock = f"{int(left) // 60}:{int(left) % 60:02d} left"
    if status is None:
        return Panel(Group(table, clock), title="Kantha demo")
    losses = [round.loss for round in status.rounds if round.loss is not None]
    trend = f"loss {losses[0]:.3f} → {losses[-1]:.3f}" if losses else "waiting for the first round"
    bar = ProgressBar(
        total=status.target_batch_size, completed=min(status.samples_in_round, status.target_batch_size), width=60
    )
    speed = f"{status.samples_per_second:.1f} samples/s"
    line = f"round {status.round} · {status.samples} samples · {speed} · {trend} · {clock}"
    return Panel(Group(table, "", Padding(bar, 0), line, f"[dim]{url}[/dim]"), title=escape(status.name), expand=False)


def _wait_until_empty(url: str) -> None:
    """Until the coordinator has read the volunteers' last reports, which say that they left."""
    deadline = time.monotonic() + 10.0
    while (status := _status(url)) is not None and status.volunteers and time.monotonic() < deadline:
        time.sleep(0.5)


def _heldout_loss(run: RunDirectory, batches: Sequence[Batch]) -> float:
    replica = Replica(run.spec)
    replica.load(list_checkpoints(run.checkpoints)[0])
    return heldout_loss(replica.model, batches)


def _figures(run: RunDirectory, before: float, after: float, out: Path, seconds: float) -> dict[str, Any]:
    ledger = Ledger(open_database(run))
    rounds, members, samples = ledger.rounds(), ledger.members(), ledger.samples_by_peer()
    share = ledger.computing_share()
    ledger.close()
    by_name: Counter[str] = Counter()  # several volunteers may have one name
    for peer_id, name in members.items():
        by_name[name] += samples.get(peer_id, 0)
    return {
        "volunteers": len(members),
        "rounds": len(rounds),
        "samples": sum(round.samples for round in rounds),
        "samples_per_volunteer": dict(by_name),
        "samples_by_their_own_count": samples_given(run.spec.fingerprint, out / "home"),
        "train_loss": [[round.round, round.loss] for round in rounds if round.loss is not None],
        "heldout_loss_start": before,
        "heldout_loss_end": after,
        "failed_rounds": sum(round.failed for round in rounds),
        "computing_share": share,
        "model_dir": str(out / "model"),
        "seconds": seconds,
    }


def _show_result(figures: dict[str, Any], run: RunDirectory, out: Path, say: Any) -> None:
    before, after = figures["heldout_loss_start"], figures["heldout_loss_end"]
    say(
        f"{figures['rounds']} rounds, {figures['failed_rounds']} of them failed; {figures['samples']} samples: "
        + ", ".join(f"{name} {count}" for name, count in figures["samples_per_volunteer"].items())
    )
    if figures["computing_share"] is not None:
        lost = 1 - figures["computing_share"]
        say(f"the volunteers computed {figures['computing_share']:.1%} of the time; {lost:.1%} went to communication")
    say(f"held-out loss: {before:.3f} → {after:.3f} ({(after - before) / before:+.1%})")
    say("what it fills in for [MASK] by now (word that stood there; its guesses):")
    for filled in fill_masks(Path(figures["model_dir"]), heldout_sentences(run.spec, _FILL_MASK_EXAMPLES)):
        say(f"  {filled.sentence}   ({filled.word}; {', '.join(filled.guesses)})")
    say(f'the model: transformers.pipeline("fill-mask", "{figures["model_dir"]}")   the logs: {out / "log"}/')
