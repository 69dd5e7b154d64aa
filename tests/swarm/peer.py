"""A peer without a model, for tests of faults: real swarm, real processes, random gradients. Says JSON lines.

python peer.py '{"name": …, "folder": …, "role": …, "bootstrap": […], "newcomer": …, "values": …, "target": …}'

The run's key is in the folder's run.pem: here every peer is its own organizer. An order that it finds in the file
NAME.order it gives to the swarm, and a notice in NAME.notice it takes.
"""

import json
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch
from hivemind.proto import runtime_pb2

from kantha.model.optim import build_optimizer
from kantha.spec import PRESETS, Schedule, ScheduleSpec, SwarmSpec
from kantha.swarm import allreduce
from kantha.swarm.guard import Guard
from kantha.swarm.identity import PeerIdentity
from kantha.swarm.membership import RunKey, Trust
from kantha.swarm.node import Node, log_to_file
from kantha.swarm.rounds_engine import RoundsEngine

SAMPLES = 8  # a second, emulated
RUN = "ab" * 32


def say(**event: Any) -> None:
    sys.stdout.write(json.dumps(event) + "\n")
    sys.stdout.flush()


def misbehave(kind: str) -> None:
    """Make this peer send parts that are not what they should be, or follow everybody's orders."""
    if kind == "obedient":
        Trust.is_signed = lambda *_, **__: True  # type: ignore[method-assign]
        return
    good = allreduce.AllReduce._send

    async def bad(self: Any, share: range) -> Any:
        async for message in good(self, share):
            buffer = message.tensor_part.buffer
            if buffer and kind == "truncated":
                message = type(message)(tensor_part=runtime_pb2.Tensor(buffer=buffer[:-1]))
            elif buffer and kind == "nan":
                message = type(message)(tensor_part=runtime_pb2.Tensor(buffer=b"\xff" * len(buffer)))
            yield message

    allreduce.AllReduce._send = bad  # type: ignore[method-assign]


def watch(engine: RoundsEngine) -> None:
    """Say at once when an averaging begins, so that a test can strike in the middle of it."""
    was = False
    while True:
        frozen = engine.is_averaging
        if frozen and not was:
            say(averaging=engine.round + 1)
        was = frozen
        time.sleep(0.005)


def main(options: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    folder = Path(options["folder"])
    name = options["name"]
    log_to_file(folder / f"{name}.log")
    if options.get("misbehave"):
        misbehave(options["misbehave"])
    identity, key = PeerIdentity(folder / f"{name}.key"), RunKey.load(folder / "run.pem")
    role = options["role"]
    node = Node(
        identity,
        Guard(Trust(RUN, key.public_key), key.certify(RUN, name, identity.peer_id, roles=(role,))),
        bootstrap=options["bootstrap"],
        listen=[f"/ip4/{options.get('host', '127.0.0.1')}/tcp/{options.get('port', 0)}"],
    )
    torch.manual_seed(0)
    rows = options["values"] // 512
    parameters = [torch.nn.Parameter(torch.randn(rows, 256) * 0.02) for _ in range(2)]
    parameters.append(torch.nn.Parameter(torch.zeros(768)))
    settings = SwarmSpec(
        target_batch_size=options["target"],
        matchmaking_seconds=4.0,
        averaging_timeout=options.get("averaging_timeout", 20.0),
    )
    schedule = ScheduleSpec(warmup_samples=1_000, **options.get("schedule", {}))
    spec = PRESETS["demo"].model_copy(update={"swarm": settings, "schedule": schedule})
    groups = [{"params": parameters[:2], "weight_decay": 0.01}, {"params": parameters[2:], "weight_decay": 0.0}]
    optimizer = build_optimizer(groups, spec)
    order, notice = folder / f"{name}.order", folder / f"{name}.notice"
    engine = RoundsEngine(
        node,
        settings,
        parameters,
        optimizer,
        Schedule(spec),
        None if options["newcomer"] else 0,
        role=role,
        folder=folder / f"{name}-state",
    )
    stop = threading.Event()
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, lambda *_: stop.set())
    say(addresses=node.addresses(), schema=engine._averager.layout.digest.hex())
    threading.Thread(target=watch, args=(engine,), daemon=True).start()
    chance = torch.Generator().manual_seed(sum(name.encode()))
    told, noticed = -1, 0
    failed: set[int] = set()
    try:
        engine.wait_ready(60.0)
        say(ready=engine.round)
        while not stop.wait(1.0):
            engine.raise_if_failed()
            if order.exists():
                engine.give_order(order.read_text())
                order.unlink()
            if notice.exists():
                node.take_notice(notice.read_text())
                notice.unlink()
            if node.guard.trust.number != noticed:
                noticed = node.guard.trust.number
                say(notice=noticed)
            if role == "trainer":
                with engine.hold():
                    pass
                engine.contribute([torch.randn(p.shape, generator=chance) for p in parameters], SAMPLES)
            for failure in list(engine.failures):
                if failure.round not in failed:
                    failed.add(failure.round)
                    say(failed=failure.round, reason=failure.reason)
            with engine.hold():
                if engine.round != told and engine.is_ready:
                    told = engine.round
                    flat = torch.cat([p.detach().reshape(-1) for p in parameters])
                    say(
                        round=told,
                        lineage=engine.lineage,
                        norm=float(flat.double().norm()),
                        head=flat[:64].tolist(),
                        schedule=engine.schedule_state.model_dump(),
                        rate=engine.learning_rate,
                        target=engine.target,
                    )
        engine.leave()
        engine.say_goodbye()
        say(left=engine.round)
    except Exception as error:
        say(error=type(error).__name__, text=str(error))
        raise
    finally:
        engine.close()
        node.close()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
