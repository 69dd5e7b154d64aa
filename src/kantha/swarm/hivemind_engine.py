"""Rounds by `hivemind.Optimizer`, checked for completeness, and able to live on outbound-only volunteers.

Every round, gradients are averaged, weighted by samples; then the replicas (parameters and optimizer moments) are
reconciled by averaging them too. The coordinator takes part in both without a weight of its own, so that after each
round it holds the swarm's state even where no volunteer can be dialled.

Differences from hivemind's own behaviour, each because of what it does otherwise:

* a round in which a part was missing, or the average is not finite, is reported as not whole (hivemind: a warning), and
  such a reconciliation is not applied (hivemind: it is, and 0/0 of a group without weights spreads as NaN);
* where averaging fails, a peer steps on the mean of its own gradients (hivemind: on zeros, as it has reset them);
* outbound-only peers count for the swarm's round, and averagers count as company (hivemind: neither, so that a swarm of
  outbound-only peers never meets, and a single volunteer never averages with the coordinator);
* state is served from a copy made between two steps (hivemind: from the memory that the optimizer is changing);
* fetching the state gives up after a while (hivemind: never).
"""

import asyncio
import logging
import multiprocessing
import time
from collections.abc import Callable, Sequence
from typing import Any, AsyncIterator  # noqa: UP035  hivemind finds streaming calls by the typing one only

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

_STATE_SECONDS = PRESENT + 40.0  # to fetch the swarm's state, before a peer gives up; peers that died are gone by then
_STATE_RETRY = 2.0  # seconds between two attempts
_NEVER = 2**62  # rounds
_ROUND_LIMIT = 10**7  # a peer that claims a later round is not believed
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

    downloaded_round: int | None = None  # of the state that the last `load_state_from_peers` brought; None: it did not

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
            whole = (
                runner.tensor_part_container.failed_size == 0
                and not runner.banned_senders
                and all(bool(tensor.isfinite().all()) for tensor in tensors)
            )
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
        """(all-reduces done so far, peers in the last one, whether it was whole and finite)."""
        with self._outcome.get_lock():
            done, peers, whole = self._outcome[:]
        return done, peers, bool(whole)

    def load_state_from_peers(self, **kwargs: Any) -> Any:
        self.downloaded_round = None
        loaded = super().load_state_from_peers(**kwargs)
        if loaded is not None and isinstance(loaded[0], dict) and isinstance(loaded[0].get("epoch"), int):
            self.downloaded_round = loaded[0]["epoch"]
        return loaded


class _GradientAverager(GradientAverager, _Verified):
    def step(self, *args: Any, reset_accumulators: bool = False, **kwargs: Any) -> Any:
        # the optimizer resets them when the round is over; until then they are what a peer falls back on
        return super().step(*args, reset_accumulators=False, **kwargs)


class _StateAverager(TrainingStateAverager, _Verified):
    _seen = 0  # all-reduces whose results were applied, or passed over

    def _apply_averaging_results_(self) -> None:
        done, _, whole = self.outcome()
        is_new, self._seen = done > self._seen, done
        if not (is_new and whole):
            return
        with self.lock_optimizer, torch.no_grad():
            super()._apply_averaging_results_()
            # hivemind sends differences; rounding may turn a mean of squares negative, and its root into NaN
            for state in self.optimizer.state.values():
                state["exp_avg_sq"].clamp_(min=0.0)

    def get_current_state(self) -> Any:
        with self.lock_optimizer:
            metadata, tensors, infos = super().get_current_state()
            return metadata, [tensor.clone() for tensor in tensors], infos

    def fetch(self, timeout: float) -> bool:
        """Take over the state of a peer that is as far as this one, or farther; returns whether one gave it."""
        before = self.local_epoch
        try:
            self.load_state_from_peers(timeout=timeout)
        except Exception as error:  # noqa: BLE001  what a peer sends can make hivemind fail in any way
            _log.warning("fetching the state failed: %r", error)
            return False
        return self.downloaded_round is not None and self.local_epoch == self.downloaded_round >= before


class _Tracker(ProgressTracker):
    averagers = 0  # averagers in the swarm
    averager_round = 0  # newest round whose state one of them holds
    swarm_round: int | None = None  # newest round of any trainer; None while there is none

    def see_averagers(self, count: int, newest_round: int) -> None:
        self.global_progress.num_peers += count - self.averagers
        self.averagers, self.averager_round = count, newest_round

    def _parse_swarm_progress_data(self, metadata: Any) -> GlobalTrainingProgress:
        self.swarm_round = None
        if isinstance(metadata, dict):
            metadata = {
                subkey: ValueWithExpiration({**entry.value, "client_mode": False}, entry.expiration_time)
                for subkey, entry in metadata.items()
                if entry.value is not None and entry.value["epoch"] < _ROUND_LIMIT
            }
            self.swarm_round = max((entry.value["epoch"] for entry in metadata.values()), default=None)
        progress = super()._parse_swarm_progress_data(metadata)
        progress.num_peers += self.averagers
        if self.averager_round > progress.epoch:
            progress.epoch, progress.samples_accumulated = self.averager_round, 0
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
            average_state_every=1,
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
        self.average_state_every = 1
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
            # Not now: two peers of which one looks for a group for gradients and the other for the reconciliation, each
            # until the same timeout, could swap places for ever.
            self.average_state_every = _NEVER

    def load_state_from_peers(self, **kwargs: Any) -> None:
        if self.scheduled_grads is not None and not self.scheduled_grads.done():
            self._tag_along_with_zero_weight(self.scheduled_grads)
        self.scheduled_grads = None
        deadline = time.monotonic() + _STATE_SECONDS
        while True:
            with self.tracker.pause_updates():
                wanted = self.tracker.global_epoch
                if self.state_averager.fetch(self.load_state_timeout) and self.local_epoch >= wanted - 1:
                    # a round may have ended while the state was on its way; the next reconciliation evens it out
                    self.set_round(max(self.local_epoch, wanted))
                    self.grad_averager.reset_accumulated_grads_()
                    return
            if self.local_epoch >= self.tracker.global_epoch:
                return  # whoever was ahead is gone
            if time.monotonic() > deadline:
                raise SwarmError(
                    f"no peer gave the swarm's state of round {wanted} within {_STATE_SECONDS:.0f} s; join again"
                )
            time.sleep(_STATE_RETRY)

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

    def see_averagers(self, count: int, newest_round: int) -> None:
        self._optimizer.tracker.see_averagers(count, newest_round)

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
        self._optimizer.tracker.see_averagers(1, round_number)  # itself: company for a volunteer that is alone
        self.state_round = round_number  # at which the replica's tensors are; the swarm may be farther
        self.witnessed: tuple[int, bool] | None = None  # the round averaged in the last tick, and whether it was whole
        self._set_round(round_number)

    @property
    def round(self) -> int:
        """The round that the swarm has finished, as far as this peer knows."""
        return int(self._optimizer.local_epoch)

    def tick(self) -> None:
        """Take part in an averaging if one is due; `state_round` and `witnessed` tell what came of it."""
        tracker, gradients = self._optimizer.tracker, self._optimizer.grad_averager
        self.witnessed = None
        swarm_round = tracker.swarm_round
        if swarm_round is None and self.round != self.state_round:
            self._set_round(self.state_round)  # all are gone; whoever comes next starts from this replica
        elif swarm_round is not None and self.state_round <= swarm_round < self.round:
            self._set_round(swarm_round)  # only a peer that is gone had come farther; the others do that round again
        if swarm_round is not None and swarm_round > self.round:
            self._catch_up(swarm_round)
            return
        before, updates, averagings = self.round, self._optimizer.updates, gradients.outcome()[0]
        syncs, _, _ = self._optimizer.state_averager.outcome()
        self._optimizer.step()
        if self._optimizer.updates == updates:
            return
        done, _, whole = gradients.outcome()
        if done > averagings:
            self.witnessed = (self.round, whole)
        done, _, whole = self._optimizer.state_averager.outcome()
        if done > syncs and whole:
            self.state_round = self.round
            self._share_state()
        else:
            self._set_round(before)  # hivemind counts the round all the same; if the swarm did, `_catch_up` will see it

    def _catch_up(self, swarm_round: int) -> None:
        """This peer missed a round: fetch the state from a trainer that can be dialled, else wait for the next one."""
        state = self._optimizer.state_averager
        if state.fetch(self._optimizer.load_state_timeout):
            self.state_round = max(self.state_round, self.round)
        self._set_round(max(self.round, swarm_round))

    def _set_round(self, number: int) -> None:
        self._optimizer.set_round(number)
        self._share_state()

    def _share_state(self) -> None:
        """Offer the replica to newcomers only while it is the swarm's."""
        self._optimizer.state_averager.allow_state_sharing = self.state_round == self.round

    def is_alive(self) -> bool:
        """Whether the processes behind it still run."""
        return self._optimizer.is_alive()

    def close(self) -> None:
        self._optimizer.shutdown()
