"""All-reduces among members in one program: the real ones, joined by queues in place of libp2p."""

import asyncio
from collections.abc import AsyncIterator, Mapping
from typing import Any

import pytest
import torch

from kantha.swarm import allreduce as module
from kantha.swarm.allreduce import AllReduce, AllReduceError
from kantha.swarm.groups import Group, Member
from kantha.swarm.parts import Layout, decode

VALUES = 300_000


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in (("STALL", 0.5), ("REPLY", 1.0), ("LINGER", 0.0)):
        monkeypatch.setattr(module, name, seconds)


class Net:
    """Members of a group, by peer, who reach each other."""

    def __init__(self, weights: Mapping[str, float], codec: str, outbound: tuple[str, ...] = ()) -> None:
        self.layout = Layout([torch.Size([VALUES]), torch.Size([100])], codec)
        members = tuple(Member(peer, peer not in outbound) for peer in sorted(weights))
        self.group = Group("g", 1, "", members)
        self.sums = {
            peer: torch.randn(VALUES + 100, generator=torch.Generator().manual_seed(i)) * weight
            for i, (peer, weight) in enumerate(sorted(weights.items()))
        }
        self.mean = torch.stack(list(self.sums.values())).sum(dim=0) / sum(weights.values())
        self.weights = weights
        self.members: dict[str, AllReduce] = {}
        self.dead: set[str] = set()

    async def run(self, errors: Mapping[str, Mapping[int, torch.Tensor]] | None = None) -> dict[str, Any]:
        """What came of each member's `run`: None, or the error."""
        for peer, weight in self.weights.items():
            self.members[peer] = AllReduce(
                self.group,
                peer,
                self.layout,
                self.sums[peer],
                weight,
                (errors or {}).get(peer, {}),
                lambda other, me=peer: _Stub(self, me, other),  # type: ignore[misc]
            )
        alive = [peer for peer in self.weights if peer not in self.dead]
        outcomes = await asyncio.gather(*(self.members[peer].run() for peer in alive), return_exceptions=True)
        return dict(zip(alive, outcomes, strict=True))

    def result(self, peer: str) -> torch.Tensor:
        results = self.members[peer].results
        return torch.cat([decode(results[i], part) for i, part in enumerate(self.layout.parts)])


class _Stub:
    def __init__(self, net: Net, me: str, other: str) -> None:
        self._net, self._me, self._other = net, me, other

    async def rpc_aggregate_part(self, requests: AsyncIterator[Any]) -> AsyncIterator[Any]:
        if self._other in self._net.dead:
            raise ConnectionRefusedError(self._other)
        header = await anext(requests)
        return self._net.members[self._other].serve(self._me, header.weight, requests)


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize(("codec", "error"), [("none", 1e-6), ("fp16", 1e-3), ("8bit", 0.02)])
def test_all_get_the_same_bytes_near_the_weighted_mean(codec: str, error: float) -> None:
    net = Net({"a": 8, "b": 24, "c": 1}, codec)
    assert set(asyncio.run(net.run()).values()) == {None}
    assert net.members["a"].results == net.members["b"].results == net.members["c"].results
    assert net.members["b"].weights == net.weights
    assert relative(net.result("a"), net.mean) < error


def test_who_has_no_samples_reduces_and_listens_and_who_cannot_be_dialled_takes_part() -> None:
    net = Net({"averager": 0, "b": 24, "c": 8}, "8bit", outbound=("b", "c"))
    assert set(asyncio.run(net.run()).values()) == {None}
    assert net.members["averager"].results == net.members["b"].results == net.members["c"].results
    assert relative(net.result("averager"), net.mean) < 0.02


def test_what_the_code_loses_is_made_up_for_the_next_time() -> None:
    """Over many rounds the mean of the results is that of the values: the errors do not add up."""
    net = Net({"a": 8, "b": 8}, "8bit")
    truth, total, rounds = net.mean.clone(), torch.zeros(VALUES + 100), 6
    sums = {peer: values.clone() for peer, values in net.sums.items()}
    errors: dict[str, dict[int, torch.Tensor]] = {"a": {}, "b": {}}
    for _ in range(rounds):
        assert set(asyncio.run(net.run(errors)).values()) == {None}
        total += net.result("a")
        for peer, member in net.members.items():
            errors[peer].update(member.errors)
            net.sums[peer] = sums[peer].clone()
            for index, lost in member.sent_errors.items():
                part = net.layout.parts[index]
                net.sums[peer][part.start : part.stop] += lost
    assert relative(total / rounds, truth) < 0.4 * relative(net.result("a"), truth)


def test_a_member_that_is_gone_ends_it_for_all_and_is_named() -> None:
    net = Net({"a": 8, "b": 8, "c": 8}, "8bit")
    net.dead.add("c")
    for outcome in asyncio.run(net.run()).values():
        assert isinstance(outcome, AllReduceError)
        assert (outcome.culprit, outcome.final) == ("c", True) or not outcome.final
    assert not net.members["a"].is_whole


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda buffer: buffer[:-1], "bytes where"),
        (lambda buffer: b"\xff" * len(buffer), "not finite"),
        (lambda buffer: b"", "bytes where"),
    ],
)
def test_damaged_parts_end_it_and_name_their_sender(monkeypatch: pytest.MonkeyPatch, damage: Any, reason: str) -> None:
    good = AllReduce._send

    async def bad(self: AllReduce, share: range) -> AsyncIterator[Any]:
        async for message in good(self, share):
            if self._me == "b" and message.tensor_part.buffer:
                message.tensor_part.buffer = damage(message.tensor_part.buffer)
            yield message

    monkeypatch.setattr(AllReduce, "_send", bad)
    net = Net({"a": 8, "b": 8, "c": 8}, "8bit")
    outcomes = asyncio.run(net.run())
    assert not any(member.is_whole for member in net.members.values())
    blamed = [outcome for outcome in outcomes.values() if isinstance(outcome, AllReduceError)]
    assert "b" in {outcome.culprit for outcome in blamed}
    assert any(reason in outcome.reason for outcome in blamed)


def test_a_stranger_and_a_second_stream_are_refused() -> None:
    async def answers(net: Net, sender: str) -> list[int]:
        async def nothing() -> AsyncIterator[Any]:
            return
            yield

        return [message.code async for message in net.members["a"].serve(sender, 1.0, nothing())]

    async def ask() -> None:
        net = Net({"a": 8, "b": 8}, "8bit")
        await net.run()
        for sender in ("stranger", "b"):
            assert await answers(net, sender) == [module.averaging_pb2.PROTOCOL_VIOLATION]

    asyncio.run(ask())


def test_a_group_without_samples_has_no_result() -> None:
    for outcome in asyncio.run(Net({"a": 0, "b": 0}, "8bit").run()).values():
        assert isinstance(outcome, AllReduceError)
