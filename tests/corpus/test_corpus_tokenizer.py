import hashlib
import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from kantha.corpus import (
    CLS_ID,
    MASK_ID,
    PAD_ID,
    SEP_ID,
    SPECIAL_TOKENS,
    UNK_ID,
    load_tokenizer,
    normalize,
    save_tokenizer,
    train_tokenizer,
)
from kantha.errors import CorpusError, DigestError, RunDirectoryError, StorageError
from kantha.spec import DataSpec, FileSource, RunSpec, TokenizerSpec


def with_file(spec: RunSpec, path: Path) -> RunSpec:
    data = DataSpec(sources=(FileSource(kind="file", path=str(path)),), sequence_length=48)
    return spec.model_copy(update={"data": data})


def test_special_tokens_have_fixed_ids(corpus_tokenizer: Tokenizer) -> None:
    assert (PAD_ID, UNK_ID, CLS_ID, SEP_ID, MASK_ID) == (0, 1, 2, 3, 4)
    assert [corpus_tokenizer.id_to_token(i) for i in range(5)] == list(SPECIAL_TOKENS)
    assert corpus_tokenizer.get_vocab_size() == 100


def test_text_comes_back(corpus_tokenizer: Tokenizer, corpus_texts: list[str]) -> None:
    for text in corpus_texts[:50]:
        ids = corpus_tokenizer.encode(text).ids
        assert (ids[0], ids[-1]) == (CLS_ID, SEP_ID)
        assert UNK_ID not in ids
        assert corpus_tokenizer.decode(ids) == normalize(text, "bn")


def test_raw_and_normalised_text_have_the_same_ids(corpus_tokenizer: Tokenizer) -> None:
    raw = " লাল\u00a0 কাঁথা\nকিনে আনল। মেয়েটি মেলায়"
    assert corpus_tokenizer.encode(raw).ids == corpus_tokenizer.encode(normalize(raw, "bn")).ids


def test_mask_is_one_token_between_words(corpus_tokenizer: Tokenizer) -> None:
    masked = corpus_tokenizer.encode("লাল [MASK] কিনে আনল।").ids
    words = corpus_tokenizer.encode("লাল", add_special_tokens=False).ids
    rest = corpus_tokenizer.encode("কিনে আনল।", add_special_tokens=False).ids
    assert masked == [CLS_ID, *words, MASK_ID, *rest, SEP_ID]
    danda = corpus_tokenizer.token_to_id("।")
    assert corpus_tokenizer.encode("লাল [MASK]।").ids == [CLS_ID, *words, MASK_ID, danda, SEP_ID]


def test_digits_and_punctuation_stand_alone(corpus_tokenizer: Tokenizer) -> None:
    tokens = corpus_tokenizer.encode("১৯৮৫ সালে নিয়ে এল।!", add_special_tokens=False).tokens
    assert [token.lstrip("▁") for token in tokens if token != "▁"][:4] == ["১", "৯", "৮", "৫"]
    assert tokens[-2:] == ["।", "!"]


def test_joiners_survive_even_if_the_corpus_has_none(corpus_tokenizer: Tokenizer) -> None:
    word = "র\u200d্যা ক্\u200cব"
    ids = corpus_tokenizer.encode(word).ids
    assert corpus_tokenizer.token_to_id("\u200d") in ids
    assert corpus_tokenizer.token_to_id("\u200c") in ids


def test_pairs_have_segments(corpus_tokenizer: Tokenizer) -> None:
    pair = corpus_tokenizer.encode("লাল কাঁথা", "ইলিশ মাছ")
    second = pair.ids.index(SEP_ID) + 1
    assert pair.type_ids == [0] * second + [1] * (len(pair.ids) - second)
    assert pair.ids[-1] == SEP_ID


def test_transformers_reads_the_same_ids(corpus_tokenizer: Tokenizer, tmp_path: Path) -> None:
    save_tokenizer(corpus_tokenizer, tmp_path / "tokenizer.json")
    plain = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"), mask_token="[MASK]")
    text = "ছোট মেয়েটি [MASK] বসে।"
    assert plain(text)["input_ids"] == corpus_tokenizer.encode(text).ids


def test_training_twice_gives_the_same_bytes(corpus_spec: RunSpec, corpus_tokenizer: Tokenizer, tmp_path: Path) -> None:
    first = save_tokenizer(corpus_tokenizer, tmp_path / "first.json")
    second = save_tokenizer(train_tokenizer(corpus_spec), tmp_path / "second.json")
    assert first == second


def test_heldout_documents_are_not_learnt(corpus_spec: RunSpec, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("লাল কাঁথা\nসবুজ মাঠ\n", encoding="utf-8")
    spec = with_file(corpus_spec, tmp_path / "a.txt")
    spec = spec.model_copy(update={"data": spec.data.model_copy(update={"heldout_share": 1.0})})
    with pytest.raises(CorpusError, match=r"no document.*data\.sources"):
        train_tokenizer(spec)


def test_a_small_corpus_gives_a_small_vocabulary(corpus_spec: RunSpec, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("লাল কাঁথা সেলাই হলো।\n" * 10, encoding="utf-8")
    assert train_tokenizer(with_file(corpus_spec, tmp_path / "a.txt")).get_vocab_size() < 100


def test_characters_of_other_scripts_take_no_row_when_rare(corpus_spec: RunSpec, tmp_path: Path) -> None:
    lines = ["লাল কাঁথা সেলাই হলো নদীর ঘাটে।" * 40] * 1_000 + ["লাল 漢 কাঁথা।"]
    (tmp_path / "a.txt").write_text("\n".join(lines), encoding="utf-8")
    spec = with_file(corpus_spec, tmp_path / "a.txt")
    tokenizer = train_tokenizer(spec.model_copy(update={"tokenizer": TokenizerSpec(vocab_size=100)}))
    assert tokenizer.token_to_id("漢") is None
    assert tokenizer.encode("লাল 漢").ids.count(UNK_ID) == 1


def test_saved_and_loaded(corpus_tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    digest = save_tokenizer(corpus_tokenizer, path)
    assert digest == hashlib.sha256(path.read_bytes()).hexdigest()
    assert load_tokenizer(path, digest).to_str() == corpus_tokenizer.to_str()
    assert load_tokenizer(path, None).to_str() == corpus_tokenizer.to_str()


def test_another_tokenizer_than_announced_is_refused(corpus_tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    digest = save_tokenizer(corpus_tokenizer, path)
    content = json.loads(path.read_text(encoding="utf-8"))
    content["model"]["vocab"][9][1] -= 1.0
    path.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(DigestError, match=rf"tokenizer\.json.*announced {digest}.*join again"):
        load_tokenizer(path, digest)


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff\xfe", None])
def test_a_damaged_or_missing_file_is_told(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(RunDirectoryError, match=r"tokenizer\.json.*create the run anew"):
        load_tokenizer(path, None)


def test_a_place_that_cannot_be_written_is_told(corpus_tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"cannot be written"):
        save_tokenizer(corpus_tokenizer, tmp_path / "missing" / "tokenizer.json")
