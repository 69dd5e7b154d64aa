from dataclasses import replace

import pytest
from transformers import AutoTokenizer

from kantha.errors import CorpusError
from kantha.evaluation.finetune import IGNORED, Settings
from kantha.evaluation.labelled import Sentence, Splits
from kantha.evaluation.ner import evaluate_ner, tag_pieces

TAGS = ["B-PER", "I-PER", "O"]


def silent(*_: object) -> None: ...


def test_the_model_and_the_crf_read_what_stands_beside_a_word(model_folder: str, entities: Splits[Sentence]) -> None:
    settings = Settings(seeds=1, epochs=20, batch=4, learning_rate=1e-3)
    scores = list(evaluate_ner(model_folder, entities, settings, silent, silent))
    frequent, crf, tuned = (score.metrics["entity F1"] for score in scores)
    assert frequent < 0.8  # the name alone does not tell
    assert crf > 0.9
    assert tuned > 0.85
    assert all(score.metrics.keys() == {"entity F1", "precision", "recall"} for score in scores)


def test_a_words_tag_stands_at_its_first_piece(model_folder: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    sentence = Sentence(("রহিম", "ক্ষঙ্গণ্ডহ্মর", "হাসল"), ("B-PER", "I-PER", "O"))
    [pieces] = tag_pieces([sentence], tokenizer, 40, TAGS)
    tokens = tokenizer.convert_ids_to_tokens(pieces.example.ids)
    assert tokens[0] == "[CLS]"
    assert tokens[-1] == "[SEP]"
    for first, tag in zip(pieces.first_pieces, (0, 1, 2), strict=True):
        assert first is not None
        assert tokens[first].startswith("▁")
        assert pieces.example.labels[first] == tag
    assert len(tokens) > 5  # the word in the middle has several pieces
    assert sorted(pieces.example.labels)[: len(tokens) - 3] == [IGNORED] * (len(tokens) - 3)


def test_words_that_do_not_fit_are_predicted_to_be_outside(model_folder: str, entities: Splits[Sentence]) -> None:
    long = Sentence(tuple(["রহিম"] * 50), tuple(["B-PER"] * 50))
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    [pieces] = tag_pieces([long], tokenizer, 40, TAGS)
    assert len(pieces.example.ids) == len(pieces.example.labels) == 40
    assert pieces.first_pieces[0] == 1
    assert pieces.first_pieces[-1] is None
    lines: list[str] = []
    few = replace(entities, train=entities.train[:20], dev=entities.dev[:5], test=[long])
    *_, tuned = evaluate_ner(model_folder, few, Settings(seeds=1, epochs=1), lines.append, silent)
    assert tuned.metrics["recall"] < 1
    assert lines[0] == "ner: 1 sentences are longer than the 40 tokens that the model reads, and were cut"


def test_entities_count_whole(model_folder: str, entities: Splits[Sentence]) -> None:
    """The most frequent tag gives each word on its own: of a name of two words it finds half, which counts nothing."""
    train = [Sentence(("লাল", "কাঁথা", "সীমা"), ("B-ORG", "O", "B-PER"))]
    test = [Sentence(("লাল", "কাঁথা"), ("B-ORG", "I-ORG")), Sentence(("সীমা", "কাঁথা"), ("B-PER", "O"))]
    frequent = next(evaluate_ner(model_folder, replace(entities, train=train, test=test), Settings(), silent, silent))
    assert frequent.metrics == {"entity F1": 0.5, "precision": 0.5, "recall": 0.5}


def test_without_entities_nothing_can_be_learned(model_folder: str, entities: Splits[Sentence]) -> None:
    train = [Sentence(("লাল",), ("O",))]
    with pytest.raises(CorpusError, match="no entity"):
        next(evaluate_ner(model_folder, replace(entities, train=train), Settings(), silent, silent))
