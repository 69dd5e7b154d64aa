"""What must hold of any stream of examples."""

import json
import random
from collections import Counter
from itertools import accumulate
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from kantha.corpus import MASK_ID, SPECIAL_TOKENS, Batch, ExampleStream, is_heldout, normalize, read_documents
from kantha.corpus.encode import SentenceEncoder
from kantha.corpus.examples import _cut
from kantha.corpus.filters import DocumentFilter
from kantha.corpus.masking import Masker
from kantha.corpus.sources import Place, Walk, open_source
from kantha.spec import FileSource, FilterSpec, Masking, RunSpec


def with_data(spec: RunSpec, **changes: object) -> RunSpec:
    return spec.model_copy(update={"data": spec.data.model_copy(update=changes)})


def lines(path: Path, texts: list[str]) -> FileSource:
    path.write_text("\n".join(texts), encoding="utf-8")
    return FileSource(kind="file", path=str(path))


def same(one: Batch, other: Batch) -> bool:
    return all(torch.equal(getattr(one, name), getattr(other, name)) for name in vars(one))


def test_a_stream_goes_on_where_another_one_was(
    corpus_spec: RunSpec, corpus_tokenizer: Tokenizer, corpus_texts: list[str], tmp_path: Path
) -> None:
    second = lines(tmp_path / "second.txt", corpus_texts[:70]).model_copy(update={"weight": 0.3})
    spec = with_data(corpus_spec, sources=(*corpus_spec.data.sources, second))
    chance = random.Random(0)
    stream = ExampleStream(spec, corpus_tokenizer, 3)
    for _ in range(12):
        for _ in range(chance.randint(0, 40)):
            stream.next_batch(chance.choice([1, 7, 32, 100]))
        state = json.loads(json.dumps(stream.state()))
        continuation = ExampleStream(spec, corpus_tokenizer, 3, state)
        assert continuation.state() == state
        for _ in range(3):
            assert same(stream.next_batch(16), continuation.next_batch(16))


@pytest.mark.parametrize(
    "state", [{}, {"window": 0, "taken": 0, "sources": []}, {"window": -1, "taken": 0, "sources": [[0] * 6]}, []]
)
def test_a_state_that_is_none(corpus_spec: RunSpec, corpus_tokenizer: Tokenizer, state: object) -> None:
    with pytest.raises(ValueError, match="no state of a stream"):
        ExampleStream(corpus_spec, corpus_tokenizer, 0, state)  # type: ignore[arg-type]


def test_two_peers_share_less_than_a_hundredth_of_their_first_10_000_examples_of_a_large_corpus(
    corpus_spec: RunSpec, corpus_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    path = tmp_path / "large.txt"
    path.write_text("".join(f"নথি {number:07} সালে লাল কাঁথা।\n" for number in range(1_500_000)), encoding="utf-8")
    spec = with_data(corpus_spec, sources=(FileSource(kind="file", path=str(path)),), shuffle_buffer=2_000)
    seen = []
    for peer in (11, 12):
        stream = ExampleStream(spec, corpus_tokenizer, peer)
        found = set()
        for _ in range(20):
            batch = stream.next_batch(500)
            ids = batch.input_ids.flatten().clone()
            ids[batch.masked_positions] = batch.masked_labels
            for row, swapped, kinds in zip(
                ids.view_as(batch.input_ids), batch.swapped, batch.token_type_ids, strict=True
            ):
                first, second = row[kinds == 0].tolist(), row[kinds == 1].tolist()
                found.add(str((second, first) if swapped else (first, second)))
        seen.append(found)
    assert len(seen[0] & seen[1]) < 100


def test_packing_loses_nothing_but_what_it_says(
    corpus_spec: RunSpec, corpus_tokenizer: Tokenizer, corpus_texts: list[str], tmp_path: Path
) -> None:
    source = lines(tmp_path / "a.txt", corpus_texts[:300])
    spec = with_data(corpus_spec, sources=(source,), shuffle_buffer=10_000)
    training = [d for d in read_documents(source, "bn") if not is_heldout(d, spec.data.heldout_share)]
    available = sum(len(corpus_tokenizer.encode(document, add_special_tokens=False).ids) for document in training)
    stream = ExampleStream(spec, corpus_tokenizer, 1)
    kept, pairs = 0, stream._sources[0]
    while True:  # the pairs of the source's first epoch
        [pair] = pairs.take(1)
        if pairs._begin.epoch == 1:
            break
        kept += len(pair.ids) - 3
    assert stream.counts.documents >= len(training)
    assert kept + stream.counts.short >= available
    assert kept <= available
    assert available - kept <= 7 * len(training)  # a rest of a document of less than 8 tokens is no example


def test_words_of_a_sentence_are_tokenized_as_the_sentence_is(corpus_tokenizer: Tokenizer) -> None:
    chance = random.Random(0)
    alphabet = "আমারইলিশমাছ।॥,.!?-—()'\"“”১২৩৳abcXYÉशि९•☃ 　্ায়়‌‍ \u0982\u0983"
    sentences = [
        text
        for _ in range(3_000)
        if (text := normalize("".join(chance.choices(alphabet, k=chance.randint(1, 30))), "bn")) and "\n" not in text
    ]
    encoder = SentenceEncoder(corpus_tokenizer)
    for _ in range(2):  # new words, then known ones
        ids, lengths = encoder.encode(sentences)
        ends = np.cumsum(lengths)
        for sentence, end, length in zip(sentences, ends, lengths, strict=True):
            expected = corpus_tokenizer.encode(sentence, add_special_tokens=False).ids
            assert ids[end - length : end].tolist() == expected, sentence
    assert encoder.encode([])[0].tolist() == []


def test_a_document_that_fits_is_cut_at_once_as_a_long_one_is() -> None:
    chance = random.Random(0)
    for _ in range(1_000):
        edges = list(accumulate((chance.randint(1, 20) for _ in range(30)), initial=0))
        first, last = sorted(chance.sample(range(31), 2))
        size = edges[last] - edges[first]
        one_pair = [(edges[first], edges[last], first + 1, last)] if size >= 8 else []
        assert list(_cut(edges, first, last, room=size + chance.randint(0, 9))) == one_pair


@pytest.mark.parametrize("masking", ["word", "ngram"])
def test_words_are_masked_whole_and_never_across_segments(
    corpus_spec: RunSpec, corpus_tokenizer: Tokenizer, masking: Masking
) -> None:
    spec = corpus_spec.model_copy(
        update={"objective": corpus_spec.objective.model_copy(update={"masking": masking, "masked_share": 0.3})}
    )
    starts = Masker(corpus_tokenizer, 0.3, "word")._starts
    stream = ExampleStream(spec, corpus_tokenizer, 5)
    runs: Counter[int] = Counter()
    for _ in range(30):
        batch = stream.next_batch(32)
        ids = batch.input_ids.flatten().clone()
        ids[batch.masked_positions] = batch.masked_labels
        masked = torch.zeros(len(ids), dtype=torch.bool)
        masked[batch.masked_positions] = True
        words = 0
        for i in range(1, len(ids)):
            if starts[ids[i]] or ids[i - 1] < len(SPECIAL_TOKENS):
                words = words + 1 if masked[i] else 0
            elif ids[i] >= len(SPECIAL_TOKENS) and not _alone(corpus_tokenizer, int(ids[i - 1])):
                assert masked[i] == masked[i - 1], "a word is masked whole or not at all"
            runs[words] += 1
    assert (ids[batch.masked_positions] >= len(SPECIAL_TOKENS)).all()
    assert MASK_ID not in batch.masked_labels
    assert runs[2] > 0


def _alone(tokenizer: Tokenizer, token: int) -> bool:
    piece = str(tokenizer.id_to_token(token))
    return token < len(SPECIAL_TOKENS) or (len(piece) == 1 and not piece.isalpha() and piece in "।!?০১২৩৪৫৬৭৮৯")


def test_the_share_that_is_masked_is_what_was_asked_for_whatever_the_length_of_the_rows(
    corpus_tokenizer: Tokenizer,
) -> None:
    chance = np.random.default_rng(0)
    lengths = chance.integers(1, 60, 4_000)
    ids = chance.integers(0, corpus_tokenizer.get_vocab_size(), lengths.sum())
    row_of = np.repeat(np.arange(len(lengths)), lengths)
    for masking in ("token", "word", "ngram"):
        masked = Masker(corpus_tokenizer, 0.15, masking).choose(ids, row_of, chance)
        assert not masked[ids < len(SPECIAL_TOKENS)].any()
        assert masked.sum() / (ids >= len(SPECIAL_TOKENS)).sum() == pytest.approx(0.15, abs=0.005)


def test_a_walk_has_every_text_once_in_an_epoch_and_goes_on_from_its_place(tmp_path: Path) -> None:
    texts = [f"{number} " + "কথা " * (number % 50) for number in range(3_000)]
    shards = open_source(lines(tmp_path / "a.txt", texts))
    assert shards.count > 5
    walk = Walk(shards, [1], buffer=700)
    epochs: list[list[str]] = [[], []]
    places, blocks = [], []
    while walk.place.epoch < 2:
        epoch = walk.place.epoch
        places.append(walk.place)
        blocks.append(walk.block())
        epochs[epoch] += blocks[-1]
    for epoch_texts in epochs:
        assert sorted(text.strip() for text in epoch_texts) == sorted(text.strip() for text in texts)
    assert epochs[0] != epochs[1]
    assert max(map(len, blocks)) == 700
    for place, block in zip(places, blocks, strict=True):
        assert Walk(shards, [1], 700, place).block() == block
    assert places[0] == Place()


def test_filters_say_what_they_drop() -> None:
    def objections(documents: list[str], **rules: object) -> list[str | None]:
        drop = DocumentFilter(FilterSpec(**rules), "bn")  # type: ignore[arg-type]
        return [drop.objection(document) for document in documents]

    bengali, english = "নদীর ঘাটে বসে বুড়ো মাঝি গান গাইল।", "An old boatman sang by the river."
    mixed, assamese = f"{bengali} {english[:9]}", "মই ৰাতিপুৱা নদীৰ পাৰলৈ গৈছিলোঁ।"
    assert objections([bengali, english, mixed, assamese], script_share=0.6) == [
        None,
        "another language",
        None,
        "another language",
    ]
    assert objections(["না।", bengali], least_letters=10) == ["too short", None]
    menu = "\n".join([bengali, *["মূল পাতা"] * 20])
    assert objections([menu, bengali], repeated_lines=0.3) == ["repeats itself", None]
    assert objections([bengali, english, bengali], duplicates="exact") == [None, None, "duplicate"]


def test_near_duplicates(corpus_texts: list[str]) -> None:
    words = " ".join(corpus_texts[:40]).split()
    long, other = " ".join(words[:300]), " ".join(words[300:600])
    changed = " ".join([*words[:150], "অন্য", "কিছু", *words[152:300]])
    near = DocumentFilter(FilterSpec(duplicates="near"), "bn")
    assert [near.objection(text) for text in (long, other, changed, "না।", "হ্যাঁ।", "না।")] == [
        None,
        None,
        "duplicate",
        None,
        None,
        "duplicate",
    ]
