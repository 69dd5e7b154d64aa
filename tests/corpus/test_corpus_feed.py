import threading
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from kantha.corpus import Batch, ExampleStream, Feed
from kantha.errors import CorpusError
from kantha.spec import FileSource, RunSpec


def same(one: Batch, other: Batch) -> bool:
    return all(torch.equal(getattr(one, name), getattr(other, name)) for name in vars(one))


def test_a_feed_has_the_stream_s_batches_and_knows_the_place_of_the_one_that_was_taken(
    corpus_spec: RunSpec, corpus_tokenizer: Tokenizer
) -> None:
    plain = ExampleStream(corpus_spec, corpus_tokenizer, 4)
    with Feed(ExampleStream(corpus_spec, corpus_tokenizer, 4), 8, ahead=5) as feed:
        for _ in range(20):
            assert same(feed.next_batch(), plain.next_batch(8))
        assert feed.state == plain.state()  # though others are made already
        continued = ExampleStream(corpus_spec, corpus_tokenizer, 4, feed.state)
        assert same(continued.next_batch(8), feed.next_batch())


def test_a_source_that_gives_nothing_lets_go_who_waits_for_it(
    corpus_spec: RunSpec, corpus_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream, hangs = ExampleStream(corpus_spec, corpus_tokenizer, 4), threading.Event()
    plain = ExampleStream(corpus_spec, corpus_tokenizer, 4).next_batch(8)
    make = stream.next_batch
    monkeypatch.setattr(stream, "next_batch", lambda size: hangs.wait(60.0) and make(size))
    with Feed(stream, 8) as feed:
        assert not feed.wait(0.01)
        hangs.set()
        assert feed.wait(60.0)
        assert feed.wait(0.0), "it is taken by next_batch alone"
        assert same(feed.next_batch(), plain)


def test_batches_that_are_made_later_have_the_size_that_was_set(
    corpus_spec: RunSpec, corpus_tokenizer: Tokenizer
) -> None:
    with Feed(ExampleStream(corpus_spec, corpus_tokenizer, 4), 8, ahead=2) as feed:
        assert feed.next_batch().size == 8
        feed.size = 3
        sizes = [feed.next_batch().size for _ in range(6)]
    assert sizes == sorted(sizes, reverse=True)
    assert (set(sizes), sizes[-1]) <= ({3, 8}, 3)


def test_a_feed_that_is_full_ends_at_once(corpus_spec: RunSpec, corpus_tokenizer: Tokenizer) -> None:
    before = threading.active_count()
    with Feed(ExampleStream(corpus_spec, corpus_tokenizer, 4), 8, ahead=1) as feed:
        feed.next_batch()
    assert threading.active_count() == before


def test_what_goes_wrong_is_raised_where_a_batch_is_asked_for(
    corpus_spec: RunSpec, corpus_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    (tmp_path / "a.txt").write_text("না।", encoding="utf-8")
    data = corpus_spec.data.model_copy(update={"sources": (FileSource(kind="file", path=str(tmp_path / "a.txt")),)})
    stream = ExampleStream(corpus_spec.model_copy(update={"data": data}), corpus_tokenizer, 4)
    with Feed(stream, 8) as feed, pytest.raises(CorpusError, match="no document gives an example"):
        feed.next_batch()
