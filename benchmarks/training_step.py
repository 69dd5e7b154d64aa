"""How much faster is a training step than that of `transformers`, and is it the same step?

Kantha's step, forward and backward of `pretraining_losses`, applies the vocabulary head to the masked tokens only, and
has its activation function in one operation. The other is `AlbertForPreTraining` as it is ordinarily trained: labels
for every position, -100 where nothing is masked. Both have the same weights, the same batch of full length, fp32 and
scaled-dot-product attention, and take turns. Before that their losses and gradients are compared. On a GPU also, in the
precision that Kantha trains in there: the peak memory of each, the largest batch that fits, doubled as long as it
does, and ours as a volunteer has it: at the size that the trainer finds, compiled if that is faster, tokens per
second and model FLOPs utilisation.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AlbertForPreTraining

from kantha.corpus import Batch
from kantha.model import build_model, pretraining_losses
from kantha.spec import PRESETS, RunSpec
from kantha.training import (
    Trainer,
    choose_device,
    choose_dtype,
    describe_device,
    full_batch,
    peak_flops,
    sizes_that_fit,
)

Loss = Callable[[AlbertForPreTraining, Batch], torch.Tensor]
_LARGEST = 4_096  # examples


def spec_of(layers: int, hidden: int, length: int) -> RunSpec:
    base = PRESETS["albert-base"]
    shape = {
        "layers": layers,
        "hidden_size": hidden,
        "intermediate_size": 4 * hidden,
        "attention_heads": hidden // 64,
        "max_positions": max(length, base.model.max_positions),
    }
    data = base.data.model_copy(update={"sequence_length": length})
    return base.model_copy(update={"model": base.model.model_copy(update=shape), "data": data})


def ours(model: AlbertForPreTraining, batch: Batch) -> torch.Tensor:
    return pretraining_losses(model, batch).total


def theirs(model: AlbertForPreTraining, batch: Batch) -> torch.Tensor:
    labels = torch.full_like(batch.input_ids, -100).flatten()
    labels[batch.masked_positions] = batch.masked_labels
    return model(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        token_type_ids=batch.token_type_ids,
        labels=labels.view_as(batch.input_ids),
        sentence_order_label=batch.swapped,
    ).loss


def gradients(loss: Loss, model: AlbertForPreTraining, batch: Batch) -> tuple[float, list[torch.Tensor]]:
    model.zero_grad()
    value = loss(model, batch)
    value.backward()
    return value.item(), [p.grad.clone() for p in model.parameters() if p.grad is not None]


def compare(mine: AlbertForPreTraining, other: AlbertForPreTraining, batch: Batch) -> tuple[float, float]:
    """(relative difference of the losses, largest relative distance of a parameter's gradients)"""
    (loss, found), (other_loss, expected) = gradients(ours, mine, batch), gradients(theirs, other, batch)
    # the gradient of the keys' bias is 0 but for rounding, since softmax does not change when all scores do
    least = 1e-6 * torch.stack([gradient.norm() for gradient in expected]).norm()
    errors = [float((a - b).norm() / b.norm()) for a, b in zip(found, expected, strict=True) if b.norm() > least]
    return abs(loss - other_loss) / other_loss, max(errors)


def seconds(loss: Loss, model: AlbertForPreTraining, batch: Batch) -> float:
    began = time.perf_counter()
    loss(model, batch).backward()
    if batch.input_ids.is_cuda:
        torch.cuda.synchronize()
    elapsed = time.perf_counter() - began
    model.zero_grad()
    return elapsed


def memory_figures(loss: Loss, model: AlbertForPreTraining, spec: RunSpec, size: int) -> dict[str, float]:
    """Peak memory of a step in GiB, and the largest batch that fits, both in the precision that Kantha trains in."""
    device = choose_device()

    def step(examples: int) -> float:
        model.zero_grad()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        with torch.autocast("cuda", choose_dtype(device)):
            value = loss(model, full_batch(spec, examples).to(device))
        value.backward()
        return torch.cuda.max_memory_allocated() / 2**30

    fitting = (examples for examples, _ in sizes_that_fit(step, _LARGEST))
    figures = {"peak_gib": step(size), "largest_batch": max(fitting, default=0)}
    model.zero_grad()
    torch.cuda.empty_cache()
    return figures


def trainer_figures(spec: RunSpec, seconds: float = 10.0) -> dict[str, float | None]:
    """What a volunteer's trainer makes of this GPU."""
    device = choose_device()
    trainer = Trainer(spec, device)
    trainer.prepare(None, lambda line: print(f"  {line}"))
    batch, tokens, flops = full_batch(spec, trainer.micro_batch), 0, 0.0
    trainer.compute([batch])
    began = time.perf_counter()
    while time.perf_counter() - began < seconds:
        if (gradients := trainer.compute([batch])) is not None:
            tokens, flops = tokens + gradients.tokens, flops + gradients.flops
    elapsed, peak = time.perf_counter() - began, peak_flops(device)
    return {
        "micro_batch": trainer.micro_batch,
        "tokens_per_second": tokens / elapsed,
        "mfu": flops / elapsed / peak if peak else None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--batch", type=int, default=4, help="examples")
    parser.add_argument("--length", type=int, default=256, help="tokens of an example")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()

    spec, device = spec_of(options.layers, options.hidden, options.length), choose_device()
    model = build_model(spec).to(device).train()
    plain = AlbertForPreTraining(model.config).to(device).train()
    plain.load_state_dict(model.state_dict())
    plain.sop_classifier.dropout.p = 0.0  # chance would make the two different steps
    ways = (("ours", ours, model), ("theirs", theirs, plain))
    batch = full_batch(spec, options.batch).to(device)
    loss_error, gradient_error = compare(model, plain, batch)
    times: dict[str, list[float]] = {"ours": [], "theirs": []}
    for repeat in range(options.repeats + 1):
        for name, loss, network in ways:
            elapsed = seconds(loss, network, batch)
            if repeat:  # the first is a warm-up
                times[name].append(elapsed)
    ratios = [other / mine for other, mine in zip(times["theirs"], times["ours"], strict=True)]
    speed = {name: options.batch * options.length / statistics.median(values) for name, values in times.items()}
    result = {
        "device": describe_device(device),
        "tokens_per_second": speed["ours"],
        "baseline_tokens_per_second": speed["theirs"],
        "ratio": statistics.median(ratios),
        "ratio_range": [min(ratios), max(ratios)],
        "relative_loss_error": loss_error,
        "max_relative_gradient_error": gradient_error,
    }
    shape = f"{options.layers} layers x {options.hidden}, batch {options.batch} x {options.length}"
    print(f"{shape}, fp32, {result['device']}, {options.repeats} repeats")
    print(f"  ours          {speed['ours']:10.0f} tokens/s")
    print(f"  transformers  {speed['theirs']:10.0f} tokens/s")
    print(f"  ratio         {result['ratio']:10.2f}  ({min(ratios):.2f} to {max(ratios):.2f})")
    print(f"  relative error: loss {loss_error:.1e}, gradients at most {gradient_error:.1e}")
    if device.type == "cuda":
        for name, loss, network in ways:
            result[name] = memory_figures(loss, network, spec, options.batch)
            print(f"  {name}: {result[name]['peak_gib']:.2f} GiB, largest batch {result[name]['largest_batch']}")
        result["trainer"] = trainer_figures(spec)
        result["mfu"] = result["trainer"]["mfu"]
        used = "unknown" if result["mfu"] is None else f"{result['mfu']:.1%}"
        print(f"  trainer: {result['trainer']['tokens_per_second']:.0f} tokens/s, model FLOPs utilisation {used}")
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
