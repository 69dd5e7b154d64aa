import random
from collections.abc import Iterator

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification, PreTrainedModel

from kantha.errors import RunDirectoryError
from kantha.evaluation.finetune import (
    Example,
    Settings,
    _learning_rate,
    _shuffled_batches,
    finetune,
    load_model,
    load_tokenizer_for,
    predict,
)


def examples(count: int) -> list[Example]:
    chance = random.Random(5)
    rows = [[2, *(chance.randrange(5, 100) for _ in range(chance.randrange(1, 12))), 3] for _ in range(count)]
    return [Example(row, len(row) % 2) for row in rows]


def tune(model_folder: str, dev_scores: Iterator[float], seed: int, epochs: int) -> tuple[PreTrainedModel, list[float]]:
    """Returns the model after it, and what a weight was when each epoch ended."""
    seen: list[float] = []

    def score(model: PreTrainedModel) -> float:
        seen.append(model.classifier.weight[0, 0].item())
        return next(dev_scores)

    model = load_model(AutoModelForSequenceClassification, model_folder, seed, num_labels=2)
    tuned = finetune(model, examples(12), score, seed, Settings(epochs=epochs, batch=4), lambda _: None)
    assert tuned.epochs == len(seen)
    assert tuned.model.classifier.weight[0, 0].item() == seen[tuned.epoch - 1]
    return tuned.model, seen


def test_it_ends_six_epochs_after_the_best_whose_weights_it_keeps(model_folder: str) -> None:
    _, seen = tune(model_folder, iter([0.1, 0.5, 0.3, 0.5, 0.2, 0.4, 0.3, 0.1, 0.9, 1.0]), seed=0, epochs=50)
    assert len(seen) == 8
    assert len(set(seen)) == 8  # they all differ: which one was kept can be told


def test_it_ends_with_the_last_epoch(model_folder: str) -> None:
    _, seen = tune(model_folder, iter([0.1, 0.2, 0.3]), seed=0, epochs=3)
    assert len(seen) == 3


def test_the_same_seed_gives_the_same_weights_and_leaves_chance_alone(model_folder: str) -> None:
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    (first, _), (again, _), (other, _) = (
        tune(model_folder, iter([0.1, 0.2]), seed=seed, epochs=2) for seed in (1, 1, 2)
    )
    assert torch.equal(torch.rand(1), expected)
    for mine, same, another in zip(first.parameters(), again.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, same)
        assert mine.numel() < 3 or not torch.equal(mine, another)


def test_predictions_come_in_the_order_of_the_examples_and_do_not_depend_on_padding(model_folder: str) -> None:
    model = load_model(AutoModelForTokenClassification, model_folder, 0, num_labels=5)
    some = examples(80)
    together = [row[: len(example.ids)] for row, example in zip(predict(model, some), some, strict=True)]
    assert len({label for row in together for label in row}) > 1
    assert together == [predict(model, [example])[0] for example in some]


def test_every_epoch_has_all_examples_in_batches_of_like_length() -> None:
    some = examples(70)
    chance = random.Random(0)
    first, second = (_shuffled_batches(some, 4, chance) for _ in range(2))
    for batches in (first, second):
        assert sorted(i for batch in batches for i in batch) == list(range(70))
        padding = sum(max(len(some[i].ids) for i in batch) - len(some[j].ids) for batch in batches for j in batch)
        assert padding < 70
    assert first != second


def test_narrow_models_learn_at_a_higher_rate_unless_told_otherwise(model_folder: str) -> None:
    model = load_model(AutoModelForSequenceClassification, model_folder, 0)
    assert _learning_rate(model, Settings()) == pytest.approx(5e-5 * 12)
    assert _learning_rate(model, Settings(learning_rate=1e-5)) == 1e-5


def test_the_models_positions_limit_what_it_reads(model_folder: str) -> None:
    tokenizer, longest = load_tokenizer_for(model_folder)
    assert longest == 40
    assert tokenizer.is_fast


def test_no_model(tmp_path: object) -> None:
    with pytest.raises(RunDirectoryError, match=f"{tmp_path}: transformers cannot load it"):
        load_tokenizer_for(str(tmp_path))
