"""A peer that speaks hivemind without our guard, and calls all that a member can call. Says one JSON object.

python hostile.py '{"folder": …, "target": multiaddr, "run": …, "certificate": …, "victim": …}'

It shows `certificate` (JSON; empty: it does not greet) and calls every RPC of the target. What it got is said by the
name of the call: {"refused": reason} or {"answered": bytes}.
"""

import asyncio
import json
import sys
from collections.abc import AsyncIterator, Awaitable
from pathlib import Path
from typing import Any

from hivemind.dht.crypto import RSASignatureValidator
from hivemind.dht.routing import DHTID
from hivemind.dht.validation import DHTRecord
from hivemind.p2p import P2P, PeerID
from hivemind.proto import averaging_pb2, dht_pb2, runtime_pb2
from hivemind.utils import MSGPackSerializer, get_dht_time
from hivemind.utils.multiaddr import Multiaddr

from kantha.swarm.identity import PeerIdentity

SECONDS = 10.0  # for an answer


async def outcome(call: Awaitable[Any]) -> dict[str, Any]:
    """What became of a call: bytes that were answered, or why it was refused."""
    try:
        answer = await asyncio.wait_for(call, SECONDS)
        if hasattr(answer, "__aiter__"):
            size = 0
            async for message in answer:
                size += message.ByteSize()
            return {"answered": size}
        if isinstance(answer, dht_pb2.StoreResponse):
            return {"answered": answer.ByteSize(), "stored": list(answer.store_ok)}
        return {"answered": len(answer) if isinstance(answer, bytes) else answer.ByteSize()}
    except Exception as error:  # noqa: BLE001  how it was refused is what is asked for
        return {"refused": repr(error)}


def report(identity: PeerIdentity, certificate: str, **changes: object) -> dict[str, Any]:
    now = get_dht_time()
    return {
        "time": now,
        "role": "trainer",
        "state": "computing",
        "dialable": True,
        "ready": True,
        "round": 3,
        "lineage": "",
        "sketch": [],
        "samples": 10**6,
        "samples_per_second": 1e6,
        "device": "hostile",
        "version": "0",
        "certificate": certificate,
        "rounds": [],
        "failed": [],
        **changes,
    }


def store(prefix: str, identity: PeerIdentity, value: object, subkey: bytes, key: str = "_reports") -> Any:
    """A request to store a record, signed by this peer's key."""
    where = DHTID.generate(source=f"{prefix}{key}").to_bytes()
    packed, expires = MSGPackSerializer.dumps(subkey), get_dht_time() + 60
    record = DHTRecord(where, packed, MSGPackSerializer.dumps(value), expires)
    body = MSGPackSerializer.dumps((record.key, record.subkey, record.value, record.expiration_time))
    signature = RSASignatureValidator.SIGNATURE_FORMAT.replace(b"_value_", identity.sign(body).encode())
    return dht_pb2.StoreRequest(
        keys=[where], subkeys=[packed], values=[record.value + signature], expiration_time=[expires], in_cache=[False]
    )


async def main(options: dict[str, Any]) -> None:
    folder, prefix, certificate = Path(options["folder"]), f"kantha-{options['run'][:32]}", options["certificate"]
    identity = PeerIdentity(folder / "peer.key")
    target = PeerID.from_base58(Multiaddr(options["target"])["p2p"])
    p2p = await P2P.create(initial_peers=[options["target"]], identity_path=str(identity.path))
    greeting = json.dumps({"certificate": json.loads(certificate), "notice": ""}).encode() if certificate else b"{}"
    averager = f"{prefix}_rounds::Averager"
    data, answer = averaging_pb2.DownloadData, averaging_pb2.DownloadData

    def unary(name: str, request: Any, kind: Any) -> Any:
        return p2p.call_protobuf_handler(target, name, request, kind)

    def message(**metadata: object) -> Any:
        return data(metadata=json.dumps(metadata).encode(), tensor_part=runtime_pb2.Tensor(buffer=b"\0" * 1000))

    async def stream(name: str, request: Any, kind: Any) -> Any:
        return await p2p.iterate_protobuf_handler(target, name, request, kind)

    async def parts() -> AsyncIterator[Any]:
        yield averaging_pb2.AveragingData(group_id=b"0" * 32, weight=1.0)
        yield averaging_pb2.AveragingData(tensor_part=runtime_pb2.Tensor(buffer=b"\0" * 1000))

    own = RSASignatureValidator(identity.key).local_public_key
    reports_key = DHTID.generate(source=f"{prefix}_reports").to_bytes()
    find = dht_pb2.FindRequest(keys=[reports_key])
    wish = {"round": options["round"] + 1, "lineage": options["lineage"], "order": ""}
    join = averaging_pb2.JoinRequest(schema_hash=bytes.fromhex(options["schema"]), gather=json.dumps(wish).encode())
    calls = {
        "greet the DHT": p2p._client.call_unary_handler(target, f"{prefix}::dht.greet", greeting),
        "greet the averager": p2p._client.call_unary_handler(target, f"{prefix}::averager.greet", greeting),
        "ping": unary("DHTProtocol.rpc_ping", dht_pb2.PingRequest(), dht_pb2.PingResponse),
        "find": unary("DHTProtocol.rpc_find", find, dht_pb2.FindResponse),
        "store": unary(
            "DHTProtocol.rpc_store",
            store(prefix, identity, report(identity, certificate), own),
            dht_pb2.StoreResponse,
        ),
        "join a group": stream(f"{averager}.rpc_join_group", join, averaging_pb2.MessageFromLeader),
        "send and receive parts": stream(f"{averager}.rpc_aggregate_part", parts(), averaging_pb2.AveragingData),
        "ask": unary(f"{averager}.rpc_ask", message(group="0", status="held"), answer),
        "fetch a result": unary(f"{averager}.rpc_fetch", message(kind="update", round=options["round"]), answer),
        "fetch a manifest": unary(f"{averager}.rpc_fetch", message(kind="manifest", round=options["round"]), answer),
        "fetch the weights": unary(
            f"{averager}.rpc_fetch", message(kind="piece", round=options["round"], name="weights", index=0), answer
        ),
        "push": unary(
            f"{averager}.rpc_push",
            message(kind="gradient", round=1, lineage="", samples=1, oldest=0, first=0, count=1),
            answer,
        ),
        "hivemind's own download": stream(
            f"{averager}.rpc_download_state", averaging_pb2.DownloadRequest(), averaging_pb2.DownloadData
        ),
    }
    if victim := options.get("victim"):  # {"public_key", "certificate"}: of another member
        theirs = RSASignatureValidator.PUBLIC_KEY_FORMAT.replace(b"_key_", victim["public_key"].encode())
        lies = {
            "a report with another's certificate": (report(identity, victim["certificate"]), own, "_reports"),
            "a report under another's name": (report(identity, victim["certificate"]), theirs, "_reports"),
            "a report under two names": (report(identity, certificate), own + theirs, "_reports"),
            "a report without a name": (report(identity, certificate), b"hello", "_reports"),
            "a report off the schema": (report(identity, certificate, samples="many"), own, "_reports"),
            "another record": (report(identity, certificate), own, "_anything"),
        }
        for name, (value, subkey, key) in lies.items():
            request = store(prefix, identity, value, subkey, key)
            calls[name] = unary("DHTProtocol.rpc_store", request, dht_pb2.StoreResponse)
    said = {name: await outcome(call) for name, call in calls.items()}
    sys.stdout.write(json.dumps(said) + "\n")
    sys.stdout.flush()
    await p2p.shutdown()


if __name__ == "__main__":
    asyncio.run(main(json.loads(sys.argv[1])))
