"""A member that sends nonsense to every RPC of a peer: random, cut, changed, too large. Says one JSON object.

python fuzzer.py '{"folder": …, "target": multiaddr, "run": …, "certificate": …, "calls": …, "seed": …, …}'

What it says, by RPC: how many calls were answered, how many ended with an error, and how many hung.
"""

import asyncio
import json
import random
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from hivemind.dht.crypto import RSASignatureValidator
from hivemind.p2p import P2P, PeerID
from hivemind.proto import averaging_pb2, dht_pb2, runtime_pb2
from hivemind.proto.p2pd_pb2 import RPCError
from hivemind.utils.multiaddr import Multiaddr
from hostile import report, store

from kantha.swarm.identity import PeerIdentity

SECONDS = 30.0  # until a call is said to hang; some may wait for a group that never comes
AT_ONCE = 16
LARGE = 9 * 2**20
NESTED = b"[" * 20_000


class Nonsense:
    """Makes input that is nearly right, or not at all, the same for the same seed."""

    def __init__(self, seed: int) -> None:
        self._chance = random.Random(seed)

    def json(self, good: dict[str, Any]) -> bytes:
        """A JSON object of the right keys and wrong values, or no JSON at all."""
        kind = self._chance.randrange(6)
        if kind == 0:
            return self._chance.randbytes(self._chance.randrange(200))
        if kind == 1:
            return NESTED
        if kind == 2:
            return json.dumps([good] * 3).encode()
        values: list[Any] = [None, -1, 10**30, 1e308, float("nan"), "", "\x00", "x" * 10_000, [], {}, [[]] * 50, True]
        bad = dict(good)
        for key in self._chance.sample(sorted(good), k=self._chance.randrange(1, len(good) + 1)):
            bad[key] = self._chance.choice(values)
        if kind == 3:
            bad.pop(self._chance.choice(sorted(good)))
        if kind == 4:
            bad["another"] = 1
        return json.dumps(bad).encode()

    def bytes(self, good: bytes) -> bytes:
        kind = self._chance.randrange(5)
        if kind == 0:
            return self._chance.randbytes(self._chance.randrange(2_000))
        if kind == 1:
            return good[: self._chance.randrange(len(good) + 1)]
        if kind == 2:
            return good + self._chance.randbytes(50)
        changed = bytearray(good)
        for _ in range(self._chance.randrange(1, 8)):
            if changed:
                changed[self._chance.randrange(len(changed))] = self._chance.randrange(256)
        return bytes(changed)

    def buffer(self) -> bytes:
        return self._chance.randbytes(self._chance.choice([0, 1, 255, 4_096, 65_536]))

    def pick(self, *choices: Any) -> Any:
        return self._chance.choice(choices)


async def main(options: dict[str, Any]) -> None:
    folder, prefix, certificate = Path(options["folder"]), f"kantha-{options['run'][:32]}", options["certificate"]
    identity = PeerIdentity(folder / "peer.key")
    target = PeerID.from_base58(Multiaddr(options["target"])["p2p"])
    p2p = await P2P.create(initial_peers=[options["target"]], identity_path=str(identity.path))
    client, nonsense = p2p._client, Nonsense(options["seed"])
    greeting = json.dumps({"certificate": json.loads(certificate), "notice": ""}).encode()
    for who in ("dht", "averager"):
        await client.call_unary_handler(target, f"{prefix}::{who}.greet", greeting)
    averager = f"{prefix}_rounds::Averager"
    own = RSASignatureValidator(identity.key).local_public_key

    def data(good: dict[str, Any]) -> bytes:
        message = averaging_pb2.DownloadData(
            metadata=nonsense.json(good), tensor_part=runtime_pb2.Tensor(buffer=nonsense.buffer())
        )
        return bytes(message.SerializeToString())

    def a_store() -> bytes:
        bad = nonsense.pick(None, [], "report", 3, {"certificate": 5}, report(identity, certificate, rounds=[{}] * 40))
        request = store(prefix, identity, bad, nonsense.pick(own, b"", b"\xff" * 500, own * 3))
        return bytes(request.SerializeToString())

    node = dht_pb2.NodeInfo(node_id=b"x" * 20)
    gift = {"kind": "gradient", "round": 3, "lineage": "", "samples": 8, "oldest": 1, "first": 0, "count": 1}
    unary = {
        f"{prefix}::dht.greet": lambda: nonsense.bytes(greeting),
        f"{prefix}::averager.greet": lambda: nonsense.json(json.loads(greeting)),
        "DHTProtocol.rpc_ping": lambda: nonsense.bytes(dht_pb2.PingRequest(peer=node).SerializeToString()),
        "DHTProtocol.rpc_find": lambda: nonsense.bytes(
            dht_pb2.FindRequest(keys=[nonsense.buffer()] * 3, peer=node).SerializeToString()
        ),
        "DHTProtocol.rpc_store": lambda: nonsense.pick(a_store(), nonsense.bytes(a_store())),
        f"{averager}.rpc_ask": lambda: data({"group": "0" * 32, "status": "held", "digest": ""}),
        f"{averager}.rpc_fetch": lambda: data(
            {"kind": nonsense.pick("update", "parts", "manifest", "piece"), "round": 1, "indices": [0], "index": 0}
        ),
        f"{averager}.rpc_push": lambda: data(nonsense.pick(gift, {"kind": "state", "manifest": {}, "index": 0})),
    }
    streams = {
        f"{averager}.rpc_join_group": lambda: averaging_pb2.JoinRequest(
            schema_hash=bytes.fromhex(options["schema"]),
            gather=nonsense.json({"round": 1, "lineage": "", "order": ""}),
        ).SerializeToString(),
        f"{averager}.rpc_aggregate_part": lambda: averaging_pb2.AveragingData(
            group_id=nonsense.buffer()[:64], weight=nonsense.pick(-1.0, 0.0, 1.0, float("nan"), float("inf"), 1e300)
        ).SerializeToString(),
        f"{averager}.rpc_download_state": lambda: nonsense.buffer(),
    }

    async def call(name: str, content: bytes) -> str:
        try:
            if name in unary:
                await asyncio.wait_for(client.call_unary_handler(target, name, content), SECONDS)
            else:
                await asyncio.wait_for(pour(name, content), SECONDS)
        except TimeoutError:
            return "hung"
        except Exception as error:  # noqa: BLE001  an error is an answer
            return type(error).__name__
        return "answered"

    async def pour(name: str, content: bytes) -> None:
        """Send a stream's bytes as they are, in the frame that hivemind expects, or in one that is none."""
        _, reader, writer = await p2p.call_binary_stream_handler(target, name)
        try:
            body = nonsense.bytes(content)
            length = nonsense.pick(len(body), len(body), 2**63, len(body) + 5, 0)
            writer.write(nonsense.pick(b"\0", b"\0", b"\0", b"\7") + length.to_bytes(P2P.HEADER_LEN, P2P.BYTEORDER))
            writer.write(body)
            await P2P.send_protobuf(RPCError(), writer)
            if length == len(body):  # else it rightly waits for the rest, until the caller goes
                await reader.read()
        finally:
            writer.close()

    said: dict[str, Counter[str]] = {}
    for name in [*unary, *streams]:
        make, limit = unary.get(name) or streams[name], asyncio.Semaphore(AT_ONCE)

        async def one(name: str = name, make: Any = make, limit: Any = limit) -> str:
            async with limit:
                return await call(name, make())

        said[name] = Counter(await asyncio.gather(*(one() for _ in range(options["calls"]))))
        said[name][await call(name, b"\x0a" + b"\xff" * LARGE)] += 1
    sys.stdout.write(json.dumps(said) + "\n")
    sys.stdout.flush()
    await p2p.shutdown()


if __name__ == "__main__":
    asyncio.run(main(json.loads(sys.argv[1])))
