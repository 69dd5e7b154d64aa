"""What does each part of the recipe do to the held-out loss? One process, equal samples, one change at a time.

Each row trains the same small ALBERT on the same text, with the production's stream, trainer, optimizer and schedule, a
step for every `--batch` examples. It differs from the first row in one thing. Every row is repeated with several seeds
(weights, order of the text, masks); the differences are those of equal seeds. Held-out loss is measured on the same
masks for all rows: single tokens, whole words, and runs of words.

Results are added to the file given by --results, and what is there already is not computed again.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any, get_args

import torch

from kantha.corpus import ExampleStream, heldout_batches, load_tokenizer, save_tokenizer, train_tokenizer
from kantha.evaluation import heldout_loss
from kantha.spec import PRESETS, FileSource, Masking, RunSpec, ShobdoSource
from kantha.training import Replica, Trainer, choose_device, describe_device

KINDS = get_args(Masking)
HELDOUT = 512
MICRO_BATCH = 32


@dataclass(frozen=True)
class Row:
    """One recipe: what differs from the first. Shares are of all samples."""

    name: str
    masking: Masking = "ngram"
    warmup: float = 0.05
    ramp: float = 0.0
    anneal: float = 0.0
    optimizer: dict[str, Any] = field(default_factory=lambda: {"name": "lamb", "learning_rate": 1e-2})


BASE = Row("as it is")
SLOWER = {"name": "lamb", "learning_rate": 5e-3}
ADAMW = {"name": "adamw", "learning_rate": 1.5e-3}
ROWS = (
    BASE,
    Row("single tokens are masked", masking="token"),
    Row("whole words are masked", masking="word"),
    Row("no warm-up", warmup=0.0),
    Row("half of the samples are warm-up", warmup=0.5),
    Row("batches grow from a quarter, over 25 %", ramp=0.25),
    Row("the last 10 % are annealed", anneal=0.1),
    Row("the last 20 % are annealed", anneal=0.2),
    Row("the last 40 % are annealed", anneal=0.4),
    Row("half the learning rate", optimizer=SLOWER),
    Row("half the learning rate, the last 20 % are annealed", optimizer=SLOWER, anneal=0.2),
    Row("AdamW", optimizer=ADAMW),
    Row("AdamW, the last 20 % are annealed", optimizer=ADAMW, anneal=0.2),
)


def spec_of(row: Row, seed: int, options: argparse.Namespace) -> RunSpec:
    demo = PRESETS["demo"]
    sources = tuple(FileSource(kind="file", path=str(path)) for path in options.text or ())
    values = demo.model_dump(mode="json")
    values["seed"] = seed
    values["model"] |= {"hidden_size": options.width, "intermediate_size": 4 * options.width, "layers": options.layers}
    values["model"] |= {"attention_heads": options.width // 32, "max_positions": options.length}
    values["data"] |= {"sequence_length": options.length, "heldout_share": 0.05, "filters": {}}
    values["data"]["sources"] = [source.model_dump() for source in sources or (ShobdoSource(kind="shobdo"),)]
    values["objective"]["masking"] = row.masking
    values["optimizer"] |= row.optimizer
    values["swarm"]["target_batch_size"] = options.batch
    values["schedule"] = {
        "warmup_samples": int(row.warmup * options.samples),
        "ramp_samples": int(row.ramp * options.samples),
        "first_batch_size": options.batch // 4,
    }
    return RunSpec.model_validate(values)


def train(row: Row, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Train one row with one seed; returns its held-out losses by kind of masking, nats per masked token."""
    torch.set_num_threads(1)
    spec = spec_of(row, seed, options)
    tokenizer = load_tokenizer(options.tokenizer, None)
    replica, stream = Replica(spec), ExampleStream(spec, tokenizer, peer_seed=seed)
    trainer = Trainer(spec, choose_device())
    state, began = replica.schedule_state, time.monotonic()
    while state.samples < options.samples:
        if row.anneal and state.samples >= (1 - row.anneal) * options.samples:
            state = state.obey(1, options.samples - state.samples) if not state.order else state
        size = min(replica.schedule.target(state), options.samples - state.samples)
        trainer.load(replica.parameters)
        gradients = trainer.compute(
            stream.next_batch(min(MICRO_BATCH, size - done)) for done in range(0, size, MICRO_BATCH)
        )
        if gradients is None:
            raise SystemExit(f"{row.name}: the gradients are not finite after {state.samples} samples")
        for parameter, gradient in zip(replica.parameters, gradients.tensors, strict=True):
            parameter.grad = gradient.to("cpu", copy=True)
        for group in replica.optimizer.param_groups:
            group["lr"] = replica.schedule.rate(state)
        replica.optimizer.step()
        state = state.advance(size)
    losses = {}
    for kind in KINDS:
        batches = heldout_batches(spec.model_copy(update={"seed": 0}), tokenizer, HELDOUT, MICRO_BATCH, kind)
        losses[kind] = heldout_loss(replica.model, batches)
    return {"heldout": losses, "seconds": time.monotonic() - began}


def key_of(row: Row, seed: int, options: argparse.Namespace) -> str:
    spec = spec_of(row, seed, options)
    return f"{spec.fingerprint} {options.samples} {row.anneal}"


def table(results: dict[str, Any], options: argparse.Namespace) -> list[dict[str, Any]]:
    """Print the rows that are whole; returns them with means and deviations."""
    rows = []
    kinds = " | ".join(f"{kind} masks" for kind in KINDS)
    print(f"\n| recipe | {kinds} | difference, {BASE.masking} masks |\n|---|{'---|' * (len(KINDS) + 1)}", flush=True)
    base: Sequence[dict[str, float]] = ()
    for row in ROWS:
        found = [results.get(key_of(row, seed, options)) for seed in range(options.seeds)]
        losses = [result["heldout"] for result in found if result is not None]
        if len(losses) < options.seeds:
            continue
        base = base or losses
        means = {kind: statistics.mean(loss[kind] for loss in losses) for kind in KINDS}
        differences = [mine[BASE.masking] - other[BASE.masking] for mine, other in zip(losses, base, strict=True)]
        difference, error = statistics.mean(differences), _error(differences)
        cells = " | ".join(f"{means[kind]:.3f}" for kind in KINDS)
        told = "" if row is BASE else f"{difference:+.3f}" + ("" if error is None else f" ± {error:.3f}")
        print(f"| {row.name} | {cells} | {told} |")
        rows.append({"recipe": row.name, "heldout": means, "difference": difference, "error": error})
    return rows


def _error(values: Sequence[float]) -> float | None:
    """Standard error of their mean; None for a single one."""
    return statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, nargs="+", help=".txt or .jsonl files; default: the dictionary shobdo")
    parser.add_argument("--samples", type=int, default=20_000, help="examples that each row trains on")
    parser.add_argument("--batch", type=int, default=32, help="examples of a step")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--width", type=int, default=128, help="hidden size, a multiple of 32")
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--length", type=int, default=64, help="tokens of an example")
    parser.add_argument(
        "--only", nargs="+", metavar="WORD", help="rows whose name contains one of these, and the first"
    )
    parser.add_argument("--lr", type=float, nargs="+", help="instead: the first row at each of these learning rates")
    parser.add_argument("--adamw", action="store_true", help="with --lr: by AdamW")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes, each with one thread")
    parser.add_argument("--results", type=Path, default=Path("recipe.json"))
    parser.add_argument("--json", type=Path, help="write the finished table to this file")
    options = parser.parse_args()
    options.tokenizer = options.results.with_suffix(".tokenizer.json")
    if not options.tokenizer.exists():
        print("training a tokenizer …", flush=True)
        save_tokenizer(train_tokenizer(spec_of(BASE, 0, options)), options.tokenizer)
    results = json.loads(options.results.read_text()) if options.results.exists() else {}
    rows: Sequence[Row] = ROWS
    if options.lr:
        name = "adamw" if options.adamw else "lamb"
        rows = [Row(f"{name} at {rate:g}", optimizer={"name": name, "learning_rate": rate}) for rate in options.lr]
    elif options.only:
        rows = [row for row in ROWS if row is BASE or any(word in row.name for word in options.only)]
    print(f"on {describe_device(choose_device())}", flush=True)
    wanted = [(row, seed) for seed in range(options.seeds) for row in rows]
    todo = [(row, seed) for row, seed in wanted if key_of(row, seed, options) not in results]
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
        running = {pool.submit(train, row, seed, options): (row, seed) for row, seed in todo}
        for done in as_completed(running):
            row, seed = running[done]
            result = results[key_of(row, seed, options)] = done.result()
            options.results.write_text(json.dumps(results, indent=1))
            losses = " ".join(f"{kind} {loss:.3f}" for kind, loss in result["heldout"].items())
            print(f"seed {seed}, {row.name}: {losses} ({result['seconds']:.0f} s)", flush=True)
    finished = table(results, options)
    if options.json:
        options.json.write_text(json.dumps({"rows": finished, "device": describe_device(choose_device())}, indent=1))


if __name__ == "__main__":
    main()
