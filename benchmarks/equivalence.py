"""Do three peers learn what one process learns, and do their replicas stay together?

Three real peers (processes, swarm, 8-bit gradients applied a round late; the third joins when the others are at round
5, by a compact snapshot) train the demo's model on their own shares of the data. Then one process makes the same number
of steps, each on as many samples as the swarm's round had, of the same walk through the data: the budget and its order
are the same. Compared are the held-out losses, mean over the seeds, and the replicas of the peers at the same round:
the largest relative distance of any two, ‖a − b‖ / ‖b‖ over all weights.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from kantha.corpus import ExampleStream, heldout_batches, load_tokenizer, save_tokenizer, train_tokenizer
from kantha.evaluation import heldout_loss
from kantha.spec import PRESETS, RunSpec, dump_spec, load_spec
from kantha.swarm.guard import Guard
from kantha.swarm.identity import PeerIdentity
from kantha.swarm.membership import RunKey, Trust
from kantha.swarm.node import Node, log_to_file
from kantha.swarm.rounds_engine import RoundsEngine
from kantha.training import Replica, Trainer

PEERS = 3
BATCH = 8  # examples computed at once
JOINS_AT = 5  # the round at which the last peer joins
HELDOUT = 512
KEPT = 3  # rounds after the last whose weights are kept, for peers to have one in common


def prepare(folder: Path, seed: int, target: int) -> RunSpec:
    """The demo's spec with another seed; its tokenizer is trained once."""
    spec = PRESETS["demo"]
    spec = spec.model_copy(update={"seed": seed, "swarm": spec.swarm.model_copy(update={"target_batch_size": target})})
    tokenizer = folder / "tokenizer.json"
    if not tokenizer.exists():
        RunKey.generate(folder / "run.pem")
        save_tokenizer(train_tokenizer(spec), tokenizer)
    (folder / f"run-{seed}.yaml").write_text(dump_spec(spec), encoding="utf-8")
    return spec


def peer(folder: Path, seed: int, index: int, rounds: int, bootstrap: Sequence[str]) -> None:
    """One peer: trains until it is ended, keeps its weights at `rounds` and shortly after."""
    torch.set_num_threads(1)
    spec = load_spec(folder / f"run-{seed}.yaml")
    log_to_file(folder / f"peer-{seed}-{index}.log")
    identity, key = PeerIdentity(folder / f"key-{seed}-{index}"), RunKey.load(folder / "run.pem")
    certificate = key.certify(spec.fingerprint, str(index), identity.peer_id)
    node = Node(identity, Guard(Trust(spec.fingerprint, key.public_key), certificate), bootstrap=bootstrap)
    replica = Replica(spec)
    engine = RoundsEngine(
        node,
        spec.swarm,
        replica.parameters,
        replica.optimizer,
        replica.schedule,
        0 if index < PEERS - 1 else None,
        folder=folder / f"state-{seed}-{index}",
    )
    try:
        print(json.dumps({"addresses": node.addresses()}), flush=True)
        engine.wait_ready(120.0)
        stream = ExampleStream(spec, load_tokenizer(folder / "tokenizer.json", None), peer_seed=index)
        trainer, version = Trainer(spec, torch.device("cpu")), -1
        saved: set[int] = set()
        while True:
            with engine.hold() as newest:
                if newest != version:
                    trainer.load(replica.parameters)
                    version = newest
                if rounds <= engine.round < rounds + KEPT and engine.round not in saved and engine.is_ready:
                    saved.add(engine.round)
                    weights = {str(i): p.detach().clone() for i, p in enumerate(replica.parameters)}
                    save_file(weights, folder / f"weights-{seed}-{index}-{engine.round}")
            gradients = trainer.compute([stream.next_batch(BATCH) for _ in range(2)])
            if gradients is None:
                continue
            result = engine.contribute(gradients.tensors, gradients.samples)
            if result is not None:
                print(json.dumps({"round": result.round, "samples": result.samples}), flush=True)
    finally:
        engine.close()
        node.close()


def swarm(folder: Path, seed: int, rounds: int) -> list[list[int]]:
    """Run the peers; returns each peer's samples by round."""
    processes: list[subprocess.Popen[str]] = []
    samples = [[0] * (rounds + KEPT + 10) for _ in range(PEERS)]
    try:
        addresses: list[str] = []
        for index in range(PEERS):
            arguments = ["_peer", str(folder), str(seed), str(index), str(rounds), json.dumps(addresses)]
            process = subprocess.Popen([sys.executable, __file__, *arguments], stdout=subprocess.PIPE, text=True)
            processes.append(process)
            assert process.stdout is not None
            if index == 0:
                addresses = json.loads(process.stdout.readline())["addresses"]
            if index == PEERS - 2:
                _follow(processes[0], samples[0], JOINS_AT)
        for index, process in enumerate(processes):
            _follow(process, samples[index], rounds + KEPT)
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
            process.wait()
    return samples


def _follow(process: "subprocess.Popen[str]", samples: list[int], until: int) -> None:
    """Note the samples that a peer reports, until it is at round `until`."""
    assert process.stdout is not None
    for line in process.stdout:
        said = json.loads(line)
        if "round" in said and said["round"] < len(samples):
            samples[said["round"]] = said["samples"]
        if said.get("round", 0) >= until:
            return
    raise SystemExit("a peer ended too early; its log is in the folder named above")


def alone(spec: RunSpec, folder: Path, samples: Sequence[Sequence[int]]) -> Replica:
    """One process: the same rounds, with the same samples of each peer's walk through the data."""
    replica = Replica(spec)
    tokenizer = load_tokenizer(folder / "tokenizer.json", None)
    streams = [ExampleStream(spec, tokenizer, peer_seed=index) for index in range(PEERS)]
    trainer, state = Trainer(spec, torch.device("cpu")), replica.schedule_state
    for number in range(1, len(samples[0])):
        trainer.load(replica.parameters)
        batches = [
            streams[index].next_batch(min(BATCH, samples[index][number] - done))
            for index in range(PEERS)
            for done in range(0, samples[index][number], BATCH)
        ]
        gradients = trainer.compute(batches)
        assert gradients is not None
        for parameter, gradient in zip(replica.parameters, gradients.tensors, strict=True):
            parameter.grad = gradient.clone()
        for group in replica.optimizer.param_groups:
            group["lr"] = replica.schedule.rate(state)
        replica.optimizer.step()
        state = state.advance(sum(peer_samples[number] for peer_samples in samples))
    return replica


def distances(folder: Path, seed: int) -> tuple[int, float]:
    """(round, largest relative distance of two replicas) at the newest round that all peers kept."""
    kept = [
        {int(path.name.rsplit("-", 1)[1]): path for path in folder.glob(f"weights-{seed}-{index}-*")}
        for index in range(PEERS)
    ]
    common = max(set.intersection(*(set(paths) for paths in kept)))
    flat = [torch.cat([t.flatten() for _, t in sorted(load_file(paths[common]).items())]) for paths in kept]
    worst = max(float((a - b).norm() / b.norm()) for a in flat for b in flat)
    return common, worst


def weights_of(folder: Path, seed: int, number: int, spec: RunSpec) -> Replica:
    replica = Replica(spec)
    tensors = load_file(folder / f"weights-{seed}-0-{number}")
    with torch.no_grad():
        for i, parameter in enumerate(replica.parameters):
            parameter.copy_(tensors[str(i)])
    return replica


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--target", type=int, default=256, help="samples that make a round")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    results = []
    with tempfile.TemporaryDirectory(prefix="kantha-equivalence-") as name:
        folder = Path(name)
        for seed in range(arguments.seeds):
            spec = prepare(folder, seed, arguments.target)
            heldout = heldout_batches(spec, load_tokenizer(folder / "tokenizer.json", None), HELDOUT, batch_size=32)
            began = time.monotonic()
            print(f"seed {seed}: three peers make {arguments.rounds} rounds …", flush=True)
            samples = swarm(folder, seed, arguments.rounds)
            number, worst = distances(folder, seed)
            together = heldout_loss(weights_of(folder, seed, number, spec).model, heldout)
            total = sum(map(sum, (peer_samples[: number + 1] for peer_samples in samples)))
            print(f"seed {seed}: {total} samples in {time.monotonic() - began:.0f} s; the same alone …", flush=True)
            single = alone(spec, folder, [peer_samples[: number + 1] for peer_samples in samples])
            results.append(
                {
                    "seed": seed,
                    "rounds": number,
                    "samples": total,
                    "heldout_swarm": together,
                    "heldout_alone": heldout_loss(single.model, heldout),
                    "distance": worst,
                }
            )
            print(f"seed {seed}: {results[-1]}", flush=True)
    swarm_mean = sum(r["heldout_swarm"] for r in results) / len(results)
    alone_mean = sum(r["heldout_alone"] for r in results) / len(results)
    difference, worst = swarm_mean / alone_mean - 1, max(r["distance"] for r in results)
    print(f"held-out loss: swarm {swarm_mean:.4f}, alone {alone_mean:.4f} ({difference:+.2%})")
    print(f"largest relative distance of two replicas: {worst:.1e}")
    if arguments.json:
        summary = {"results": results, "difference": difference, "distance": worst}
        arguments.json.write_text(json.dumps(summary, indent=1) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["_peer"]:
        peer(Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), int(sys.argv[5]), json.loads(sys.argv[6]))
    else:
        main()
