import random
from collections import Counter
from functools import partial
from itertools import chain, combinations
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from kantha.corpus import (
    CLS_ID,
    MASK_ID,
    PAD_ID,
    SEP_ID,
    SPECIAL_TOKENS,
    Batch,
    ExampleStream,
    heldout_batches,
    heldout_sentences,
    is_heldout,
    normalize,
    read_documents,
)
from kantha.errors import CorpusError
from kantha.spec import FileSource, Masking, RunSpec, Source

bengali = partial(normalize, language="bn")


def with_sources(spec: RunSpec, *sources: Source, sequence_length: int = 48) -> RunSpec:
    data = spec.data.model_copy(update={"sources": sources, "sequence_length": sequence_length})
    return spec.model_copy(update={"data": data})


def text_file(path: Path, lines: list[str], weight: float = 1.0) -> FileSource:
    path.write_text("\n".join(lines), encoding="utf-8")
    return FileSource(kind="file", path=str(path), weight=weight)


def originals(batch: Batch) -> torch.Tensor:
    """The token ids before masking."""
    ids = batch.input_ids.flatten().clone()
    ids[batch.masked_positions] = batch.masked_labels
    return ids.view_as(batch.input_ids)


def segments(batch: Batch, row: int) -> tuple[list[int], list[int]]:
    """A and B of one example, unmasked, without special tokens."""
    ids = originals(batch)[row]
    real = batch.attention_mask[row] == 1
    first, second = (ids[real & (batch.token_type_ids[row] == segment)].tolist() for segment in (0, 1))
    assert first[0] == CLS_ID
    assert first[-1] == SEP_ID
    assert second[-1] == SEP_ID
    return first[1:-1], second[:-1]


def in_text_order(batch: Batch, row: int) -> list[int]:
    first, second = segments(batch, row)
    return second + first if batch.swapped[row] else first + second


@pytest.fixture(scope="module")
def batches(corpus_spec: RunSpec, corpus_tokenizer: Tokenizer) -> list[Batch]:
    stream = ExampleStream(corpus_spec, corpus_tokenizer, peer_seed=7)
    return [stream.next_batch(32) for _ in range(60)]


def test_shapes(batches: list[Batch], corpus_spec: RunSpec) -> None:
    for batch in batches:
        assert batch.size == 32
        length = batch.input_ids.shape[1]
        assert length <= corpus_spec.data.sequence_length
        assert length % 8 == 0
        assert batch.attention_mask.shape == batch.token_type_ids.shape == batch.input_ids.shape == (32, length)
        assert batch.swapped.shape == (32,)
        assert batch.masked_positions.shape == batch.masked_labels.shape
        assert batch.attention_mask.sum(1).max() > length - 8
        assert torch.equal(batch.attention_mask == 0, batch.input_ids == PAD_ID)
        assert all(tensor.dtype == torch.int64 for tensor in vars(batch).values())


def test_to_moves_every_tensor(batches: list[Batch]) -> None:
    assert {tensor.device.type for tensor in vars(batches[0].to("meta")).values()} == {"meta"}


def test_examples_are_runs_of_one_document(
    batches: list[Batch], corpus_tokenizer: Tokenizer, corpus_texts: list[str]
) -> None:
    documents = [bengali(text) for text in corpus_texts]
    for batch in batches[:10]:
        for row in range(batch.size):
            text = corpus_tokenizer.decode(in_text_order(batch, row))
            assert any(text in document for document in documents), text


def test_about_half_of_the_pairs_are_swapped(batches: list[Batch]) -> None:
    swapped = torch.cat([batch.swapped for batch in batches]).float().mean()
    assert 0.45 < swapped < 0.55


@pytest.mark.parametrize("masking", ["token", "word", "ngram"])
def test_masked_share_and_kinds(corpus_spec: RunSpec, corpus_tokenizer: Tokenizer, masking: Masking) -> None:
    objective = corpus_spec.objective.model_copy(update={"masking": masking})
    stream = ExampleStream(corpus_spec.model_copy(update={"objective": objective}), corpus_tokenizer, peer_seed=7)
    masked = ordinary = 0
    replaced, labels = [], []
    for _ in range(120):
        batch = stream.next_batch(32)
        before = originals(batch)
        ordinary += int((before >= len(SPECIAL_TOKENS)).sum())
        masked += len(batch.masked_labels)
        replaced.append(batch.input_ids.flatten()[batch.masked_positions])
        labels.append(batch.masked_labels)
        assert batch.masked_positions.diff().min() > 0
        if masking == "token":  # the others may find no run of words that is short enough for a short example
            assert set((batch.masked_positions // batch.input_ids.shape[1]).tolist()) == set(range(batch.size))
    assert masked / ordinary == pytest.approx(objective.masked_share, abs=0.005)
    now, label = torch.cat(replaced), torch.cat(labels)
    assert label.min() >= len(SPECIAL_TOKENS)  # no special token is ever masked
    assert (now == MASK_ID).float().mean() == pytest.approx(0.8, abs=0.02)
    assert (now == label).float().mean() == pytest.approx(0.1, abs=0.02)
    other = now[(now != MASK_ID) & (now != label)]
    assert len(other) / len(now) == pytest.approx(0.1, abs=0.02)
    assert other.min() >= len(SPECIAL_TOKENS)
    assert other.max() < corpus_tokenizer.get_vocab_size()


def test_labels_are_the_original_tokens(corpus_spec: RunSpec, corpus_tokenizer: Tokenizer, tmp_path: Path) -> None:
    line = "লাল কাঁথা নদীর ঘাটে বসে নতুন শিক্ষক দেখে হাসল। ছোট মেয়েটি গান গাইল।"
    spec = with_sources(corpus_spec, text_file(tmp_path / "a.txt", [line]), sequence_length=128)
    batch = ExampleStream(spec, corpus_tokenizer, 0).next_batch(20)
    expected = corpus_tokenizer.encode(line, add_special_tokens=False).ids
    for row in range(20):
        assert in_text_order(batch, row) == expected


def test_the_same_seed_gives_the_same_batches(
    corpus_spec: RunSpec, corpus_tokenizer: Tokenizer, batches: list[Batch]
) -> None:
    stream = ExampleStream(corpus_spec, corpus_tokenizer, peer_seed=7)
    for batch in batches[:5]:
        again = stream.next_batch(32)
        assert all(torch.equal(getattr(batch, name), getattr(again, name)) for name in vars(batch))


def test_every_peer_and_epoch_has_its_own_order_of_the_same_text(
    corpus_spec: RunSpec, corpus_tokenizer: Tokenizer, tmp_path: Path, corpus_texts: list[str]
) -> None:
    sentences = sorted({text.split("।")[0] + "।" for text in corpus_texts if text.find("।") < 60})[:100]
    spec = with_sources(corpus_spec, text_file(tmp_path / "a.txt", sentences), sequence_length=512)
    training = [sentence for sentence in map(bengali, sentences) if not is_heldout(sentence, spec.data.heldout_share)]

    def window(stream: ExampleStream) -> list[str]:
        batch = stream.next_batch(512)
        return [corpus_tokenizer.decode(in_text_order(batch, row)) for row in range(batch.size)]

    peer = ExampleStream(spec, corpus_tokenizer, 1)
    orders = [window(peer), window(peer), window(ExampleStream(spec, corpus_tokenizer, 2**80 + 1))]
    epochs = 512 // len(training)
    for order in orders:  # every text as often as any other, but for the epochs that a window cuts
        assert set(Counter(order).values()) <= {epochs - 1, epochs, epochs + 1}
        assert set(order) == set(training)
    for one, other in combinations(orders, 2):
        assert len(set(one[:30]) & set(other[:30])) < 20


def test_heldout_documents_never_train(corpus_spec: RunSpec, corpus_tokenizer: Tokenizer, batches: list[Batch]) -> None:
    documents = list(read_documents(corpus_spec.data.sources[0], "bn"))
    held = [document for document in documents if is_heldout(document, corpus_spec.data.heldout_share)]
    training = [document for document in documents if document not in held]
    assert 30 < len(held) < 90

    def found(batch: Batch, where: list[str]) -> list[bool]:
        texts = [corpus_tokenizer.decode(in_text_order(batch, row)) for row in range(batch.size)]
        long = [text for text in texts if text.count(" ") > 12]  # shorter ones may stand in several documents
        return [any(text in document for document in where) for text in long]

    for batch in batches:
        assert all(found(batch, training))
    for batch in heldout_batches(corpus_spec, corpus_tokenizer, examples=100, batch_size=30):
        assert all(found(batch, held))
        assert not any(found(batch, training))


def test_heldout_batches_are_fixed(corpus_spec: RunSpec, corpus_tokenizer: Tokenizer) -> None:
    first, again = (heldout_batches(corpus_spec, corpus_tokenizer, 70, 32) for _ in range(2))
    assert [batch.size for batch in first] == [32, 32, 6]
    for batch, same in zip(first, again, strict=True):
        assert all(torch.equal(getattr(batch, name), getattr(same, name)) for name in vars(batch))


def test_heldout_sentences_read_well(corpus_spec: RunSpec) -> None:
    sentences = heldout_sentences(corpus_spec, 5)
    assert sentences == heldout_sentences(corpus_spec, 5)
    assert len(set(sentences)) == 5
    held = [
        d for d in read_documents(corpus_spec.data.sources[0], "bn") if is_heldout(d, corpus_spec.data.heldout_share)
    ]
    for sentence in sentences:
        assert any(sentence in document for document in held)
        assert 25 <= len(sentence) <= 90
        assert len(sentence.split()) >= 4


def test_a_long_document_is_used_whole_in_full_examples(
    corpus_spec: RunSpec, corpus_tokenizer: Tokenizer, tmp_path: Path, corpus_texts: list[str]
) -> None:
    document = bengali(" ".join(corpus_texts[:40]))
    spec = with_sources(corpus_spec, text_file(tmp_path / "a.txt", [document]), sequence_length=128)
    available = Counter(corpus_tokenizer.encode(document, add_special_tokens=False).ids)
    batch = ExampleStream(spec, corpus_tokenizer, 0).next_batch(512)  # many times the document
    examples = {tuple(in_text_order(batch, row)) for row in range(batch.size)}
    assert sum(map(len, examples)) >= available.total() - 7  # a rest of less than 8 tokens is no example
    assert not Counter(chain.from_iterable(examples)) - available  # nothing twice, so nothing was left out either
    assert available.total() / len(examples) > 0.75 * (128 - 3)
    texts = [corpus_tokenizer.decode(list(example)) for example in examples]
    assert sum(text.endswith(("।", "!", "?")) for text in texts) > 0.9 * len(texts)


def test_one_sentence_is_cut_in_the_middle(corpus_spec: RunSpec, corpus_tokenizer: Tokenizer, tmp_path: Path) -> None:
    lines = ["বুড়ো মাঝি বর্ষার রাতে নদীর ঘাটে বসে গান গাইল।", "হ্যাঁ।"]  # the second one is too short
    spec = with_sources(corpus_spec, text_file(tmp_path / "a.txt", lines))
    batch = ExampleStream(spec, corpus_tokenizer, 0).next_batch(10)
    for row in range(10):
        first, second = segments(batch, row)
        assert abs(len(first) - len(second)) <= 1
        assert corpus_tokenizer.decode(in_text_order(batch, row)) == bengali(lines[0])


def test_sources_are_mixed_by_weight(
    corpus_spec: RunSpec, corpus_tokenizer: Tokenizer, tmp_path: Path, corpus_texts: list[str]
) -> None:
    chance = random.Random(0)
    marked = ["১ " + text for text in chance.sample(corpus_texts, 50)]
    plain = [text.replace("১৯৮৫", "") for text in corpus_texts]
    spec = with_sources(
        corpus_spec,
        text_file(tmp_path / "few.txt", [text.replace("১৯৮৫", "") for text in marked], weight=3.0),
        text_file(tmp_path / "many.txt", plain, weight=1.0),
        sequence_length=512,
    )
    batch = ExampleStream(spec, corpus_tokenizer, 0).next_batch(800)
    digit = corpus_tokenizer.token_to_id("১")
    share = (originals(batch) == digit).any(1).float().mean()
    assert share == pytest.approx(0.75, abs=0.06)


@pytest.mark.parametrize("lines", [[], ["হ্যাঁ।", "না।"]])
def test_a_corpus_without_usable_text_is_told(
    corpus_spec: RunSpec, corpus_tokenizer: Tokenizer, tmp_path: Path, lines: list[str]
) -> None:
    spec = with_sources(corpus_spec, text_file(tmp_path / "short.txt", lines))
    with pytest.raises(CorpusError, match=r"short\.txt: no document.*add text"):
        ExampleStream(spec, corpus_tokenizer, 0).next_batch(4)
    with pytest.raises(CorpusError, match=r"no held-out document.*heldout_share"):
        heldout_batches(spec, corpus_tokenizer, 4, 4)


def test_a_batch_in_parts_has_the_same_examples(corpus_spec: RunSpec, corpus_tokenizer: Tokenizer) -> None:
    batch = ExampleStream(corpus_spec, corpus_tokenizer, 3).next_batch(7)
    assert batch.split(7) == [batch]
    for most in (1, 2, 3, 6):
        parts = batch.split(most)
        assert [part.size for part in parts[:-1]] == [most] * (6 // most)
        for name in ("input_ids", "attention_mask", "token_type_ids", "masked_labels", "swapped"):
            assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(batch, name))
        whole = torch.zeros_like(batch.input_ids, dtype=torch.bool)
        whole.view(-1)[batch.masked_positions] = True
        for part, rows in zip(parts, whole.split(most), strict=True):
            assert torch.equal(part.masked_positions, rows.flatten().nonzero().flatten())
