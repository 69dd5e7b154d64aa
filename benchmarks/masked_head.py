"""How much faster is a step when the vocabulary head is applied to the masked tokens only?

Compares forward and backward of `kantha.model.pretraining_losses` with `AlbertForPreTraining` given labels for every
position, the same model and batches, in turn. Prints a table; with --json FILE, one object.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AlbertForPreTraining

from kantha.corpus import MASK_ID, Batch
from kantha.model import build_model, pretraining_losses
from kantha.spec import PRESETS


def random_batch(size: int, length: int, vocabulary: int, generator: torch.Generator) -> Batch:
    """A batch of random tokens, 15 % of them masked."""
    tokens = torch.randint(5, vocabulary, (size, length), generator=generator)
    masked = torch.randperm(size * length, generator=generator)[: int(0.15 * size * length)].sort().values
    inputs = tokens.clone().flatten()
    inputs[masked] = MASK_ID
    return Batch(
        input_ids=inputs.view(size, length),
        attention_mask=torch.ones(size, length, dtype=torch.int64),
        token_type_ids=torch.zeros(size, length, dtype=torch.int64),
        masked_positions=masked,
        masked_labels=tokens.flatten()[masked],
        swapped=torch.randint(0, 2, (size,), generator=generator),
    )


def masked_only(model: AlbertForPreTraining, batch: Batch) -> torch.Tensor:
    return pretraining_losses(model, batch).total


def every_position(model: AlbertForPreTraining, batch: Batch) -> torch.Tensor:
    labels = torch.full_like(batch.input_ids, -100).flatten()
    labels[batch.masked_positions] = batch.masked_labels
    output = model(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        token_type_ids=batch.token_type_ids,
        labels=labels.view_as(batch.input_ids),
        sentence_order_label=batch.swapped,
    )
    return output.loss


def seconds(
    loss: Callable[[AlbertForPreTraining, Batch], torch.Tensor], model: AlbertForPreTraining, batch: Batch
) -> float:
    began = time.perf_counter()
    loss(model, batch).backward()
    if batch.input_ids.is_cuda:
        torch.cuda.synchronize()
    model.zero_grad()
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=sorted(PRESETS), default="albert-base")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()

    spec = PRESETS[arguments.preset]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = build_model(spec).to(device)
    generator = torch.Generator().manual_seed(0)
    batch = random_batch(arguments.batch, arguments.length, spec.tokenizer.vocab_size, generator).to(device)
    times: dict[str, list[float]] = {"masked only": [], "every position": []}
    for repeat in range(arguments.repeats + 1):
        for name, loss in (("masked only", masked_only), ("every position", every_position)):
            elapsed = seconds(loss, model, batch)
            if repeat:  # the first is a warm-up
                times[name].append(elapsed)
    tokens = arguments.batch * arguments.length
    ratios = [full / ours for full, ours in zip(times["every position"], times["masked only"], strict=True)]
    result = {
        "preset": arguments.preset,
        "device": str(device),
        "tokens_per_second": {name: tokens / statistics.median(values) for name, values in times.items()},
        "speedup_median": statistics.median(ratios),
        "speedup_range": [min(ratios), max(ratios)],
    }
    print(f"{arguments.preset}, batch {arguments.batch} x {arguments.length} on {device}, {arguments.repeats} repeats")
    for name, speed in result["tokens_per_second"].items():
        print(f"  {name:15} {speed:10.0f} tokens/s")
    print(f"  speedup         {result['speedup_median']:10.2f}  ({min(ratios):.2f} to {max(ratios):.2f})")
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
