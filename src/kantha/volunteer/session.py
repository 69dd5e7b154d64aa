"""What a volunteer knows of itself and of the swarm; the training loop tells it, report and console show it."""

import threading
import time
from collections import deque
from dataclasses import dataclass

from kantha.errors import printable
from kantha.swarm.reports import LEFT, ROUNDS_KEPT, Report, RoundReport
from kantha.swarm.rounds import Phase
from kantha.swarm.rounds_engine import RoundResult, RoundsEngine
from kantha.training import Gradients

PAUSED = "paused"
_STATES = {
    Phase.LOADING: "loading",
    Phase.COMPUTING: "training",
    Phase.AVERAGING: "training",  # it goes on while the last round is averaged
    Phase.CATCHING_UP: "catching up",
    Phase.LEFT: LEFT,
}


@dataclass
class _Work:
    """What gradients that were handed over stand for."""

    samples: int = 0
    seconds: float = 0.0
    waited: float = 0.0
    mlm_loss_sum: float = 0.0
    sop_loss_sum: float = 0.0
    tokens: int = 0
    flops: float = 0.0

    def add(self, other: "_Work") -> None:
        self.samples += other.samples
        self.seconds += other.seconds
        self.waited += other.waited
        self.mlm_loss_sum += other.mlm_loss_sum
        self.sop_loss_sum += other.sop_loss_sum
        self.tokens += other.tokens
        self.flops += other.flops


class Session:
    """Safe to use from several threads."""

    def __init__(
        self, device: str, engine: RoundsEngine, peak_flops: float | None = None, counted_before: int = 0
    ) -> None:
        """
        :param peak_flops: operations a second that the device could do; None where that is not known
        :param counted_before: samples of this peer's earlier sessions that count
        """
        self.device = device
        self.started = time.monotonic()
        self.last_round: RoundResult | None = None
        self.counted = 0  # samples in finished rounds
        self.counted_before = counted_before
        self.paused = ""  # why this machine does not compute now; empty: it does
        self._engine, self._peak = engine, peak_flops
        self._lock = threading.Lock()
        self._rounds: deque[RoundReport] = deque(maxlen=ROUNDS_KEPT)
        self._work: deque[_Work] = deque()  # handed over, and in no round yet; oldest first
        self._total = _Work()

    # ---- told by the training loop

    def computed(self, gradients: Gradients, seconds: float, waited: float) -> None:
        """Gradients that are about to be handed over.

        :param seconds: spent computing them
        :param waited: since the last were done
        """
        work = _Work(
            gradients.samples,
            seconds,
            waited,
            gradients.mlm_loss * gradients.samples,
            gradients.sop_loss * gradients.samples,
            gradients.tokens,
            gradients.flops,
        )
        with self._lock:
            self._work.append(work)
            self._total.add(work)

    def ended(self, result: RoundResult) -> None:
        """A round ended. Work counts in the order in which it was done."""
        with self._lock:
            self._take(result.lost)
            work = self._take(result.samples)
            self._rounds.append(
                RoundReport(
                    round=result.round,
                    lineage=result.lineage,
                    samples=work.samples,
                    seconds=work.seconds,
                    waited=work.waited,
                    mlm_loss_sum=work.mlm_loss_sum,
                    sop_loss_sum=work.sop_loss_sum,
                    peers=max(1, result.peers),
                )
            )
            self.counted += work.samples
            self.last_round = result

    def _take(self, samples: int) -> _Work:
        taken = _Work()
        while self._work and taken.samples + self._work[0].samples <= samples:
            taken.add(self._work.popleft())
        return taken

    # ---- asked by the engine's report and the console

    @property
    def round(self) -> int:
        return self._engine.round

    @property
    def samples(self) -> int:
        """This machine's that are in no finished round yet."""
        with self._lock:
            return sum(work.samples for work in self._work)

    @property
    def counted_in_all(self) -> int:
        """Samples of all sessions of this peer that count."""
        return self.counted_before + self.counted

    @property
    def state(self) -> str:
        return PAUSED if self.paused else _STATES[self._engine.phase]

    @property
    def speed(self) -> float:
        """Samples per second."""
        return 0.0 if self.paused else self._engine.samples_per_second

    @property
    def computing_share(self) -> float | None:
        """Share of the time since training began that was spent computing; None before the first gradients."""
        with self._lock:
            seconds, waited = self._total.seconds, self._total.waited
        return seconds / (seconds + waited) if seconds > 0 else None

    @property
    def tokens_per_second(self) -> float:
        """Of text; padding does not count."""
        with self._lock:
            return self.speed * self._total.tokens / max(1, self._total.samples)

    @property
    def utilisation(self) -> float | None:
        """Model FLOPs utilisation, see `kantha.training.utilisation`; None where the device's peak is not known."""
        with self._lock:
            flops = self._total.flops / max(1, self._total.samples)
        return self.speed * flops / self._peak if self._peak else None

    @property
    def pace(self) -> str:
        """The speed since training began, to go on a sentence with; empty before the first gradients."""
        with self._lock:
            total = self._total
            seconds = total.seconds + total.waited
            if seconds == 0:
                return ""
            pace = f", {total.samples / seconds:.1f} samples/s, {total.tokens / seconds:.0f} tokens/s"
            used = f", {total.flops / seconds / self._peak:.0%} of the device's peak" if self._peak else ""
            return f"{pace}{used}, computing {total.seconds / seconds:.0%} of the time"

    @property
    def loss(self) -> float | None:
        """Mean training loss of this machine's last finished round."""
        with self._lock:
            last = next((r for r in reversed(self._rounds) if r.samples), None)
            return (last.mlm_loss_sum + last.sop_loss_sum) / last.samples if last else None

    @property
    def peers(self) -> int:
        """Volunteers that are here, this one included."""
        return max(1, len(self._engine.roster.present("trainer")))

    @property
    def coordinator_here(self) -> bool:
        return bool(self._engine.roster.present("averager"))

    def complete(self, report: Report) -> Report:
        """A report with what only the session knows."""
        with self._lock:
            rounds = list(self._rounds)
        state = LEFT if report.state == LEFT else self.state
        update: dict[str, object] = {"state": state, "device": self.device, "rounds": rounds}
        if self.paused:
            update["samples_per_second"] = 0.0  # others would count on samples that do not come
        return report.copy(update=update)

    def next_event(self) -> str:
        """What will happen next, in a sentence."""
        engine = self._engine
        if self.paused:
            return f"the moderators paused the run ({printable(self.paused)}); it goes on by itself"
        if engine.phase is Phase.AVERAGING:
            return f"averaging round {engine.round + 1} with the others; computing goes on"
        if engine.phase is Phase.CATCHING_UP:
            return "fetching what the others did meanwhile; nothing is lost"
        samples, rate = engine.progress()
        if rate <= 0:
            return "waiting for the swarm's first samples"
        seconds = (engine.target - samples) / rate
        annealed = engine.schedule_state.annealed
        phase = "" if annealed is None else f"; annealing, {annealed:.0%} done"
        if seconds < 1:
            return f"round {engine.round + 1} is about to end{phase}"
        return f"round {engine.round + 1} ends in about {seconds:.0f} s{phase}"
