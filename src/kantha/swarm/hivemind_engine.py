"""Rounds by `hivemind.Optimizer`, checked for completeness, and able to live on outbound-only volunteers.

Every round, gradients are averaged, weighted by samples; then every `state_sync_rounds` rounds the replicas (parameters
and optimizer moments) are averaged too. The coordinator takes part in both without a weight of its own, so that after
each round it holds the swarm's state even where no volunteer can be dialled.

Differences from hivemind's own behaviour, each because of what it does otherwise:

* a round in which a part was missing, or the average is not finite, is reported as not whole (hivemind: a warning);
* outbound-only peers count for the swarm's round, and averagers count as company (hivemind: neither, so that a swarm of
  outbound-only peers never meets, and a single volunteer never averages with the coordinator);
* a lone peer steps on the mean of its accumulated gradients (hivemind: on those of its last micro-batch);
* fetching the state gives up after some attempts (hivemind: never).
"""

import asyncio
import logging
import multiprocessing
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import hivemind
import torch
from hivemind.averaging import DecentralizedAverager
from hivemind.compression import CompressionBase, Float16Compression, NoCompression, Uniform8BitQuantization
from hivemind.optim.grad_averager import GradientAverager
from hivemind.optim.progress_tracker import GlobalTrainingProgress, ProgressTracker
from hivemind.optim.state_averager import TrainingStateAverager
from hivemind.p2p import P2PContext
from hivemind.proto import averaging_pb2
from hivemind.utils import ValueWithExpiration
from torch.optim.lr_scheduler import LRScheduler

from kantha.errors import SwarmError
from kantha.spec import SwarmSpec
from kantha.swarm.engine import Progress, RoundResult
from kantha.swarm.node import Node
from kantha.swarm.reports import PRESENT

_STATE_ATTEMPTS = 4  # downloads of the swarm's state before a peer gives up
_LINGER = 0.25  # seconds that a streamed answer stays open after its last message
_MOMENTS = ("exp_avg", "exp_avg_sq")  # averaged together with the parameters
_log = logging.getLogger(__name__)

_COMPRESSION: dict[str, Callable[[], CompressionBase]] = {
    "none": NoCompression,
    "fp16": Float16Compression,
    "8bit": Uniform8BitQuantization,
}


class _Verified(DecentralizedAverager):
    """An averager that tells, across its process border, whether the last all-reduce was whole.

    Its streamed answers linger. p2pd resets a stream as soon as the answering side has closed it, and a reset throws
    away what the asking side's p2pd has not read yet: on a busy machine the last message of an answer is lost now and
    then, which may be the only part of an all-reduce, or the word that a group has begun.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._outcome = multiprocessing.Array("q", 3)  # all-reduces done, peers in the last, whether it was whole
        super().__init__(*args, **kwargs)

    async def _run_allreduce_inplace_(
        self, tensors: Sequence[torch.Tensor], group_info: Any, group_id: bytes | None = None, **kwargs: Any
    ) -> None:
        whole = False
        try:
            await super()._run_allreduce_inplace_(tensors, group_info, group_id, **kwargs)
            runner = self._running_groups[group_info.group_id].result()
            whole = runner.tensor_part_container.failed_size == 0 and not runner.banned_senders
        finally:
            with self._outcome.get_lock():
                self._outcome[:] = [self._outcome[0] + 1, group_info.group_size, whole]

    async def rpc_join_group(
        self, request: averaging_pb2.JoinRequest, context: P2PContext
    ) -> AsyncIterator[averaging_pb2.MessageFromLeader]:
        async for message in super().rpc_join_group(request, context):
            yield message
        await asyncio.sleep(_LINGER)

    async def rpc_aggregate_part(
        self, stream: AsyncIterator[averaging_pb2.AveragingData], context: P2PContext
    ) -> AsyncIterator[averaging_pb2.AveragingData]:
        async for message in super().rpc_aggregate_part(stream, context):
            yield message
        await asyncio.sleep(_LINGER)

    async def rpc_download_state(
        self, request: averaging_pb2.DownloadRequest, context: P2PContext
    ) -> AsyncIterator[averaging_pb2.DownloadData]:
        async for message in super().rpc_download_state(request, context):
            yield message
        await asyncio.sleep(_LINGER)

    def outcome(self) -> tuple[int, int, bool]:
        """(all-reduces done so far, peers in the last one, whether it was whole)."""
        with self._outcome.get_lock():
            done, peers, whole = self._outcome[:]
        return done, peers, bool(whole)


class _GradientAverager(_Verified, GradientAverager):
    pass


class _StateAverager(_Verified, TrainingStateAverager):
    def _apply_averaging_results_(self) -> None:
        super()._apply_averaging_results_()
        # hivemind sends differences; rounding may turn a mean of squares negative, and its root into NaN
        with torch.no_grad():
            for state in self.optimizer.state.values():
                state["exp_avg_sq"].clamp_(min=0.0)


class _Tracker(ProgressTracker):
    averagers = 0  # averagers in the swarm
    swarm_round: int | None = None  # newest round of any trainer; None while there is none

    def _parse_swarm_progress_data(self, metadata: Any) -> GlobalTrainingProgress:
        self.swarm_round = None
        if isinstance(metadata, dict):
            metadata = {
                subkey: ValueWithExpiration({**entry.value, "client_mode": False}, entry.expiration_time)
                for subkey, entry in metadata.items()
                if entry.value is not None
            }
            self.swarm_round = max((entry.value["epoch"] for entry in metadata.values()), default=None)
        progress = super()._parse_swarm_progress_data(metadata)
        progress.num_peers += self.averagers
        return progress


class _Optimizer(hivemind.Optimizer):
    updates = 0  # rounds ended by an update of this peer, not by fetching the state
    whole = True
    peers = 1
    scheduled_grads: Any

    def __init__(self, *, node: Node, settings: SwarmSpec, **kwargs: Any) -> None:
        self._node = node
        compression = _COMPRESSION[settings.compression]
        self._timeouts = {
            "min_matchmaking_time": settings.matchmaking_seconds,
            "request_timeout": min(3.0, settings.matchmaking_seconds / 2),
            "allreduce_timeout": settings.averaging_timeout,
            # a peer that sends nothing for this long is out of the group; one that is busy computing must not be
            "next_chunk_timeout": max(10.0, settings.averaging_timeout / 3),
        }
        super().__init__(
            dht=node.dht,
            run_id=node.prefix,
            target_batch_size=settings.target_batch_size,
            matchmaking_time=settings.matchmaking_seconds,
            averaging_timeout=settings.averaging_timeout,
            average_state_every=settings.state_sync_rounds,
            average_opt_statistics=_MOMENTS,
            delay_state_averaging=False,
            client_mode=node.outbound_only,
            grad_compression=compression(),
            state_averaging_compression=NoCompression(),  # second moments do not survive fewer bits
            tracker_opts={"private_key": node.identity.key, "metadata_expiration": PRESENT},
            **kwargs,
        )

    def _make_progress_tracker(self, target_batch_size: int, **kwargs: Any) -> _Tracker:
        return _Tracker(
            dht=self.dht,
            prefix=self.run_id,
            target_batch_size=target_batch_size,
            client_mode=self.client_mode,
            start=True,
            **kwargs,
        )

    def _make_state_averager(self, **kwargs: Any) -> _StateAverager:
        return _StateAverager(
            dht=self.dht,
            prefix=f"{self.run_id}_state_averager",
            client_mode=self.client_mode,
            auxiliary=self.auxiliary,
            sync_epoch_when_averaging=True,
            start=True,
            **self._timeouts,
            **kwargs,
        )

    def _make_gradient_averager(self, factory: None, **kwargs: Any) -> _GradientAverager:
        return _GradientAverager(
            dht=self.dht,
            prefix=f"{self.run_id}_grad_averager",
            parameters=self.state_averager.main_parameters,
            client_mode=self.client_mode,
            auxiliary=self.auxiliary,
            start=True,
            **self._timeouts,
            **kwargs,
        )

    def _update_global_epoch(self, grad_scaler: None) -> None:
        syncs, _, _ = self.state_averager.outcome()
        super()._update_global_epoch(grad_scaler)
        self.updates += 1
        done, _, whole = self.state_averager.outcome()
        if done > syncs and not whole:
            _log.warning("round %d: a part was missing when replicas were reconciled", self.local_epoch)
            self.whole = False

    def _begin_averaging_gradients(self, grad_scaler: None) -> bool:
        began = bool(super()._begin_averaging_gradients(grad_scaler))
        if not began:
            self._load_local_gradients_into_optimizer()
            self.peers, self.whole = 1, self.tracker.global_progress.num_peers <= 1
        return began

    def _average_gradients_and_load_into_optimizer(self, maybe_step_control: Any) -> None:
        try:
            maybe_step_control.result(self.averaging_timeout)
            with self.grad_averager.get_tensors() as tensors:
                if not all(bool(tensor.isfinite().all()) for tensor in tensors):
                    raise SwarmError("the averaged gradient is not finite")
            self._load_averaged_gradients_into_optimizer_()
            _, self.peers, self.whole = self.grad_averager.outcome()
        except Exception as error:  # noqa: BLE001  whatever hivemind raises here, the round failed and is said to have
            _log.warning("round %d: averaging gradients failed: %r", self.local_epoch + 1, error)
            self._load_local_gradients_into_optimizer()
            self.peers, self.whole = 1, False

    def load_state_from_peers(self, **kwargs: Any) -> None:
        if self.scheduled_grads is not None and not self.scheduled_grads.done():
            self._tag_along_with_zero_weight(self.scheduled_grads)
        self.scheduled_grads = None
        with self.tracker.pause_updates():
            for _ in range(_STATE_ATTEMPTS):
                self.state_averager.load_state_from_peers(timeout=self.load_state_timeout, **kwargs)
                if self.local_epoch >= self.tracker.global_epoch - 1:
                    break
                time.sleep(1.0)
            else:
                raise SwarmError(
                    f"no peer gave the swarm's state of round {self.tracker.global_epoch} "
                    f"in {_STATE_ATTEMPTS} attempts; join again"
                )
            # one round behind: it ended while the state was on its way; the next sync of the replicas evens it out
            self.set_round(max(self.local_epoch, self.tracker.global_epoch))
            self.grad_averager.reset_accumulated_grads_()

    def is_alive(self) -> bool:
        return bool(self.state_averager.is_alive() and self.grad_averager.is_alive())

    def set_round(self, number: int) -> None:
        """Say which round the replica is at, after its tensors were loaded from elsewhere."""
        self.state_averager.local_epoch = number
        self.state_averager._update_scheduler()
        self.tracker.global_progress.epoch = number
        self.tracker.report_local_progress(number, samples_accumulated=0)
        if not self.client_mode:
            self.state_averager.state_sharing_priority = number


class HivemindEngine:
    """The engine of a trainer. Made in the main thread, before CUDA is initialised: it forks its averagers."""

    def __init__(
        self,
        node: Node,
        settings: SwarmSpec,
        parameters: Sequence[torch.nn.Parameter],
        optimizer: torch.optim.Optimizer,
        schedule: LRScheduler,
        round_number: int,
    ) -> None:
        """
        :param parameters: the replica's parameters, on the CPU, in the order of `contribute`'s gradients
        :param optimizer: over the same parameters, grouped as it likes, its state allocated
        :param schedule: stepped once a round
        :param round_number: the round at which these tensors are
        """
        self._parameters = parameters
        self._settings = settings
        self._optimizer = _Optimizer(
            node=node, settings=settings, optimizer=optimizer, scheduler=schedule, batch_size_per_step=1
        )
        self._optimizer.set_round(round_number)

    @property
    def round(self) -> int:
        return int(self._optimizer.local_epoch)

    def contribute(self, gradients: Sequence[torch.Tensor], samples: int) -> RoundResult | None:
        optimizer = self._optimizer
        for parameter, gradient in zip(self._parameters, gradients, strict=True):
            parameter.grad.copy_(gradient)  # type: ignore[union-attr]  # hivemind made the buffers
        updates, accumulated = optimizer.updates, optimizer.grad_averager.local_samples_accumulated
        optimizer.step(batch_size=samples)
        if optimizer.updates == updates:
            return None
        return RoundResult(self.round, accumulated + samples, optimizer.peers, optimizer.whole)

    def progress(self) -> Progress:
        progress = self._optimizer.tracker.global_progress
        left = progress.eta_next_epoch - hivemind.utils.get_dht_time()
        return Progress(
            samples=progress.samples_accumulated,
            target=self._settings.target_batch_size,
            peers=progress.num_peers - self._optimizer.tracker.averagers,
            seconds_left=max(0.0, left) if left < 24 * 3600 else None,
        )

    def see_averagers(self, count: int) -> None:
        self._optimizer.tracker.averagers = count

    def is_alive(self) -> bool:
        return self._optimizer.is_alive()

    def close(self) -> None:
        self._optimizer.shutdown()


class HivemindAverager:
    """The coordinator's part: takes part in every averaging without a weight, and so holds the swarm's state.

    Call `tick` again and again, from one thread.
    """

    def __init__(
        self,
        node: Node,
        settings: SwarmSpec,
        optimizer: torch.optim.Optimizer,
        schedule: LRScheduler,
        round_number: int,
    ) -> None:
        self._optimizer = _Optimizer(
            node=node, settings=settings, optimizer=optimizer, scheduler=schedule, auxiliary=True
        )
        self._optimizer.set_round(round_number)
        self.is_current = True
        self._share_state()

    @property
    def round(self) -> int:
        return int(self._optimizer.local_epoch)

    def tick(self) -> bool:
        """Take part in an averaging if one is due. Returns whether the replica changed and is the swarm's, whole."""
        tracker, state = self._optimizer.tracker, self._optimizer.state_averager
        if tracker.swarm_round is not None and tracker.swarm_round > self.round:
            return self._catch_up(tracker.swarm_round)
        updates, before, (averagings, _, _) = self._optimizer.updates, self.round, state.outcome()
        self._optimizer.step()
        if self._optimizer.updates == updates:
            return False
        done, _, whole = state.outcome()
        if done > averagings and whole:
            self.is_current = True
        else:  # hivemind counts the round all the same; without the swarm's state it did not happen here
            self._optimizer.set_round(before)
            self.is_current = tracker.swarm_round is None or tracker.swarm_round <= before
        self._share_state()
        return self.is_current and done > averagings

    def _catch_up(self, swarm_round: int) -> bool:
        """This peer missed a round: fetch the state from a trainer that can be dialled, else wait for the next sync."""
        self.is_current = False
        self._share_state()
        state = self._optimizer.state_averager
        before = self.round
        state.load_state_from_peers(timeout=self._optimizer.load_state_timeout)
        self.is_current = self.round > before and self.round >= swarm_round - 1
        self._optimizer.set_round(max(self.round, swarm_round))
        self._share_state()
        return self.is_current

    def is_alive(self) -> bool:
        """Whether the processes behind it still run."""
        return self._optimizer.is_alive()

    def _share_state(self) -> None:
        """Offer the replica to newcomers only while it is the swarm's."""
        self._optimizer.state_averager.allow_state_sharing = self.is_current

    def close(self) -> None:
        self._optimizer.shutdown()
