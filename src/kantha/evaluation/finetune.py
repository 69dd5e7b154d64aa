"""Fine-tuning a pretrained model on labelled data: one short loop for texts and for words.

The `Trainer` of `transformers` would do it too, but needs `accelerate`, and is more code to set up than this loop.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from kantha.errors import RunDirectoryError
from kantha.evaluation.heldout import quiet_transformers
from kantha.training import choose_device

IGNORED = -100  # label of a piece that nothing is asked about, as in `torch.nn.functional.cross_entropy`

_PATIENCE = 6  # epochs without a better dev score, after which fine-tuning ends; it often begins with a few of them
_WARMUP_SHARE = 0.1  # of all steps
_WEIGHT_DECAY = 0.01
_MAX_GRAD_NORM = 1.0
_POOL = 16  # so many batches are sorted by length together: little padding, yet every epoch has batches of its own
_POSITIONS = 512  # of a model that has no limit of its own
_LEARNING_RATE, _WIDTH = 5e-5, 768  # usual for a model as wide as BERT-base; narrower ones need more


@dataclass(frozen=True)
class Settings:
    """How to fine-tune."""

    seeds: int = 3
    """How many times; the seeds are 0, 1, …"""
    epochs: int = 20
    """At most; it ends when the dev score has not become better for six epochs."""
    batch: int = 16
    """Examples in a step."""
    learning_rate: float | None = None
    """At its peak. None takes 5e-5 for a model of width 768, and for others in inverse proportion to their width."""


class Example(NamedTuple):
    """Token ids, special ones included, and one label for all of them or one for each."""

    ids: list[int]
    labels: int | list[int]


class FineTuned(NamedTuple):
    """A model with the weights of its best epoch (1 is the first), and its dev score then."""

    model: PreTrainedModel
    dev_score: float
    epoch: int
    epochs: int


def load_tokenizer_for(model: str) -> tuple[PreTrainedTokenizerFast, int]:
    """The tokenizer of a model folder or hub name, and how many tokens the model reads at most.

    Raises `RunDirectoryError` where there is no such model, or none with a fast tokenizer.
    """
    positions = getattr(load_config(model), "max_position_embeddings", _POSITIONS)
    with _loading(model):
        tokenizer = AutoTokenizer.from_pretrained(model)
    if not tokenizer.is_fast:
        raise RunDirectoryError(f"{model}: has no fast tokenizer (tokenizer.json), which this needs; choose another")
    return tokenizer, min(tokenizer.model_max_length, positions)


def load_config(model: str) -> Any:
    """Raises `RunDirectoryError` where there is no such model."""
    with _loading(model):
        return AutoConfig.from_pretrained(model)


def load_model(kind: Any, model: str, seed: int, **options: Any) -> Any:
    """The model as `kind`, an auto class of `transformers`, in fp32; what it lacks is drawn from the seed.

    Raises `RunDirectoryError`.
    """
    with _loading(model), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return kind.from_pretrained(model, **options).float()


@contextmanager
def _loading(model: str) -> Iterator[None]:
    try:
        with quiet_transformers():
            yield
    except (OSError, ValueError, SafetensorError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__).rstrip(".")
        raise RunDirectoryError(
            f"{model}: transformers cannot load it ({reason}); give a run, a checkpoint, a model folder as "
            "`kantha export` writes it, or a name on the Hugging Face hub"
        ) from None


def finetune(
    model: PreTrainedModel,
    examples: Sequence[Example],
    score: Callable[[PreTrainedModel], float],
    seed: int,
    settings: Settings,
    on_progress: Callable[[float], None],
) -> FineTuned:
    """Train `model` by AdamW, and keep the epoch that `score` (on dev data, higher is better) likes best.

    The learning rate rises for a tenth of the steps and then falls to zero, both linearly. On a GPU that is built for
    it the computing is in bf16, else in fp32. `on_progress` hears the share of the steps that are done.
    """
    device = choose_device()
    model = model.to(device)
    optimizer = torch.optim.AdamW(_parameter_groups(model), lr=_learning_rate(model, settings))
    per_epoch = -(-len(examples) // settings.batch)
    total = per_epoch * settings.epochs
    warmup = max(1, round(_WARMUP_SHARE * total))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, (total - step) / max(1, total - warmup))
    )
    order = random.Random(seed)
    best = FineTuned(model, float("-inf"), 0, 0)
    weights: dict[str, torch.Tensor] = {}
    epoch = 0
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        while epoch < settings.epochs and epoch - best.epoch < _PATIENCE:
            epoch += 1
            model.train()
            for done, batch in enumerate(_shuffled_batches(examples, settings.batch, order), 1):
                inputs = _collate([examples[i] for i in batch], model)
                with _autocast(device):
                    loss = model(**inputs).loss
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), _MAX_GRAD_NORM)
                optimizer.step()
                schedule.step()
                on_progress(((epoch - 1) * per_epoch + done) / total)
            dev_score = score(model)
            if not weights or dev_score > best.dev_score:
                best = FineTuned(model, dev_score, epoch, epoch)
                weights = {name: tensor.to("cpu", copy=True) for name, tensor in model.state_dict().items()}
    model.load_state_dict(weights)
    return best._replace(epochs=epoch)


@torch.no_grad()
def predict(model: PreTrainedModel, examples: Sequence[Example]) -> list[Any]:
    """The likeliest label of every example, in their order: one, or one for each token."""
    model.eval()
    order = sorted(range(len(examples)), key=lambda i: len(examples[i].ids))
    found: dict[int, Any] = {}
    for start in range(0, len(order), 64):
        batch = order[start : start + 64]
        inputs = _collate([examples[i] for i in batch], model)
        del inputs["labels"]
        with _autocast(model.device):
            logits = model(**inputs).logits
        found.update(zip(batch, logits.argmax(-1).tolist(), strict=True))
    return [found[i] for i in range(len(examples))]


def _learning_rate(model: PreTrainedModel, settings: Settings) -> float:
    return settings.learning_rate or _LEARNING_RATE * _WIDTH / model.config.hidden_size


def _parameter_groups(model: PreTrainedModel) -> list[dict[str, Any]]:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": _WEIGHT_DECAY},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},  # biases and LayerNorm
    ]


def _shuffled_batches(examples: Sequence[Example], size: int, chance: random.Random) -> list[list[int]]:
    order = chance.sample(range(len(examples)), len(examples))
    batches = []
    for start in range(0, len(order), size * _POOL):
        pool = sorted(order[start : start + size * _POOL], key=lambda i: len(examples[i].ids))
        batches += [pool[i : i + size] for i in range(0, len(pool), size)]
    chance.shuffle(batches)
    return batches


def _collate(examples: Sequence[Example], model: PreTrainedModel) -> dict[str, torch.Tensor]:
    width = max(len(example.ids) for example in examples)

    def padded(rows: list[list[int]], filler: int) -> torch.Tensor:
        return torch.tensor([row + [filler] * (width - len(row)) for row in rows], device=model.device)

    inputs = {
        "input_ids": padded([example.ids for example in examples], model.config.pad_token_id or 0),
        "attention_mask": padded([[1] * len(example.ids) for example in examples], 0),
    }
    rows = [example.labels for example in examples if isinstance(example.labels, list)]
    if rows:
        inputs["labels"] = padded(rows, IGNORED)
    else:
        inputs["labels"] = torch.tensor([example.labels for example in examples], device=model.device)
    return inputs


def _autocast(device: torch.device) -> torch.autocast:
    native = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    return torch.autocast(device.type, torch.bfloat16, enabled=native)
