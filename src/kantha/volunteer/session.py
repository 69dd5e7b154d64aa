"""What a volunteer knows of itself and of the swarm, shared by the training loop, its reporter and its console."""

import threading
import time
from collections import deque

from hivemind.utils import get_dht_time

from kantha import __version__
from kantha.swarm.engine import Progress, RoundResult
from kantha.swarm.reports import LEFT, ROUNDS_KEPT, Report, RoundReport
from kantha.training import Gradients

_SPEED_WINDOW = 60.0  # seconds over which this machine's speed is measured
_WAITING = 0.5  # a hand-over of gradients that takes longer than this is an averaging


class Session:
    """Safe to use from several threads."""

    def __init__(self, device: str, round_number: int) -> None:
        self.device = device
        self.started = time.monotonic()
        self.swarm_speed = 0.0  # samples per second of all peers
        self.swarm_samples = 0  # towards the running round
        self.peers = 0
        self.coordinator_here = False
        self.last_round: RoundResult | None = None
        self._lock = threading.Lock()
        self._rounds: deque[RoundReport] = deque(maxlen=ROUNDS_KEPT)
        self._history: deque[tuple[float, int]] = deque()
        self._handing_over: float | None = None
        self._left = False
        self.counted = 0  # samples in finished rounds
        self._start_round(round_number)

    def _start_round(self, number: int) -> None:
        self._round = number
        self._samples = 0
        self._seconds = 0.0
        self._mlm_loss_sum = 0.0
        self._sop_loss_sum = 0.0

    # ---- told by the training loop

    def computed(self, gradients: Gradients, seconds: float) -> None:
        now = time.monotonic()
        with self._lock:
            self._samples += gradients.samples
            self._seconds += seconds
            self._mlm_loss_sum += gradients.mlm_loss * gradients.samples
            self._sop_loss_sum += gradients.sop_loss * gradients.samples
            self._history.append((now, gradients.samples))
            while now - self._history[0][0] > _SPEED_WINDOW:
                self._history.popleft()
            self._handing_over = now

    def handed_over(self, result: RoundResult | None, round_number: int) -> None:
        """The gradients are with the engine: still in the same round, or in the next, or where the swarm is by now."""
        with self._lock:
            self._handing_over = None
            if result is not None:
                self._rounds.append(
                    RoundReport(
                        round=result.round,
                        samples=self._samples,
                        seconds=self._seconds,
                        mlm_loss_sum=self._mlm_loss_sum,
                        sop_loss_sum=self._sop_loss_sum,
                        peers=max(1, result.peers),
                        whole=result.whole,
                    )
                )
                self.counted += self._samples
                self.last_round = result
            if round_number != self._round:
                self._start_round(round_number)

    def leave(self) -> None:
        with self._lock:
            self._left = True

    # ---- asked by the reporter and the console

    @property
    def round(self) -> int:
        return self._round

    @property
    def samples(self) -> int:
        """This machine's, towards the running round."""
        return self._samples

    @property
    def state(self) -> str:
        if self._left:
            return LEFT
        handing_over = self._handing_over
        if handing_over is not None and time.monotonic() - handing_over > _WAITING:
            return "averaging"
        return "training"

    @property
    def speed(self) -> float:
        """Samples per second, averaging included."""
        with self._lock:
            if len(self._history) < 2:
                return 0.0
            elapsed = time.monotonic() - self._history[0][0]
            return sum(samples for _, samples in list(self._history)[1:]) / max(elapsed, 1e-3)

    @property
    def loss(self) -> float | None:
        """Mean training loss of this machine's last finished round."""
        with self._lock:
            last = next((r for r in reversed(self._rounds) if r.samples), None)
            return (last.mlm_loss_sum + last.sop_loss_sum) / last.samples if last else None

    def report(self) -> Report:
        state, speed = self.state, self.speed
        with self._lock:
            return Report(
                time=get_dht_time(),
                role="trainer",
                state=state,
                round=self._round,
                samples=self._samples,
                samples_per_second=speed,
                device=self.device,
                version=__version__,
                rounds=list(self._rounds),
            )

    def next_event(self, progress: Progress) -> str:
        """What will happen next, in a sentence."""
        if self.state == "averaging":
            return f"averaging round {self._round + 1} with the others"
        if progress.seconds_left is None:
            return "waiting for the swarm's first samples"
        if progress.seconds_left < 1:
            return f"round {self._round + 1} is about to end"
        return f"round {self._round + 1} ends in about {progress.seconds_left:.0f} s"
