"""One real peer: a DHT process and a libp2p daemon."""

import asyncio
import gc
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kantha.swarm.guard import Guard
from kantha.swarm.identity import PeerIdentity
from kantha.swarm.membership import RunKey, Trust
from kantha.swarm.node import Node, _Discreet

pytestmark = pytest.mark.swarm


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    identity, key, run = PeerIdentity(tmp_path / "peer.key"), RunKey.generate(tmp_path / "run.pem"), "0f" * 32
    node = Node(identity, Guard(Trust(run, key.public_key), key.certify(run, "Asha", identity.peer_id)))
    yield node
    node.close()


async def _collect_garbage(dht: Any, _node: object) -> None:
    """In the DHT's process, again and again."""

    async def collect() -> None:
        for _ in range(30):
            gc.collect()
            await asyncio.sleep(0)

    dht.collecting = asyncio.create_task(collect())


async def _nothing(_dht: object, _node: object) -> None:
    pass


def test_an_answer_is_not_collected_as_garbage(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was, now and then: a coordinator hung when it started."""
    run_coroutine = node.dht.run_coroutine

    def and_another(*args: Any, **kwargs: Any) -> Any:
        future = run_coroutine(*args, **kwargs)
        run_coroutine(_nothing, return_future=True)  # from then on hivemind does not know the task any more
        return future

    monkeypatch.setattr(node.dht, "run_coroutine", and_another)
    for _ in range(2):
        run_coroutine(_collect_garbage)
        assert any(node.peer_id in address for address in node.addresses())


def test_where_people_are_is_not_in_the_log() -> None:
    formatter = _Discreet("%(message)s")
    for said, written in [
        (
            "[/ip4/203.0.113.7/tcp/4001] dial tcp4 203.0.113.7:4001: refused",
            "[/ip4/(address)/tcp/4001] dial tcp4 (address):4001: refused",
        ),
        ("/ip6/2001:db8::7/tcp/4001 dial [2001:db8::7]:4001", "/ip6/(address)/tcp/4001 dial [(address)]:4001"),
        (
            "dial tcp4 127.0.0.1:4001, torch 2.13.0, round 412, 12:30:45",
            "dial tcp4 127.0.0.1:4001, torch 2.13.0, round 412, 12:30:45",
        ),
    ]:
        record = logging.LogRecord("hivemind", logging.WARNING, "", 0, said, None, None)
        assert formatter.format(record) == written
