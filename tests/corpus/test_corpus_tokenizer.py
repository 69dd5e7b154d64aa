import hashlib
import json
import random
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from kantha.corpus import (
    CLS_ID,
    MASK_ID,
    PAD_ID,
    SEP_ID,
    SPECIAL_TOKENS,
    UNK_ID,
    check_tokenizer,
    load_tokenizer,
    normalize,
    read_tokenizer,
    save_tokenizer,
    train_tokenizer,
)
from kantha.errors import CorpusError, DigestError, RunDirectoryError, SpecError, StorageError, TokenizerError
from kantha.spec import DataSpec, FileSource, RunSpec, TokenizerSpec


def with_file(spec: RunSpec, path: Path) -> RunSpec:
    data = DataSpec(sources=(FileSource(kind="file", path=str(path)),), sequence_length=48)
    return spec.model_copy(update={"data": data})


def test_special_tokens_have_fixed_ids(corpus_tokenizer: Tokenizer) -> None:
    assert (PAD_ID, UNK_ID, CLS_ID, SEP_ID, MASK_ID) == (0, 1, 2, 3, 4)
    assert [corpus_tokenizer.id_to_token(i) for i in range(5)] == list(SPECIAL_TOKENS)
    assert corpus_tokenizer.get_vocab_size() == 150


def test_text_comes_back(corpus_tokenizer: Tokenizer, corpus_texts: list[str]) -> None:
    for text in corpus_texts[:50]:
        ids = corpus_tokenizer.encode(text).ids
        assert (ids[0], ids[-1]) == (CLS_ID, SEP_ID)
        assert UNK_ID not in ids
        assert corpus_tokenizer.decode(ids) == normalize(text, "bn")


@pytest.mark.parametrize(
    "raw",
    [
        " লাল\u00a0 কাঁথা\nকিনে আনল। মেয়েটি মেলায়",
        "\ufeffলাল কাঁথা ",
        "\u200bলাল\u00ad কাঁ\u200bথা\u200e",
        "লাল| কাঁথা |নদী || মাঠ\u09f7 ঘাট\u09e4 বই\u09e5",
        "লাল ।কাঁথা ।। মাঠ",
        "সে দু:খ পেল, অন্ত:পুর:ঢাকা",
        "বই: লাল | মাঠ",
        "র\u200c\u200d্যাব ডা\u200cল ঈষত্\u200d হাসি\u200d বাক্\u200cদত্তা",
        "নদীর ঘাটে\r\n\r\n| লাল | কাঁথা",
        " \t\n",
    ],
)
def test_raw_and_normalised_text_have_the_same_ids(corpus_tokenizer: Tokenizer, raw: str) -> None:
    canonical = normalize(raw, "bn")
    assert canonical != raw
    assert corpus_tokenizer.encode(raw).ids == corpus_tokenizer.encode(canonical).ids


def test_any_raw_text_has_the_ids_of_its_normalised_form(corpus_tokenizer: Tokenizer) -> None:
    alphabet = "কতযরদুনি\u09df\u09bc\u09be\u09c7\u09cd\u09cd।॥|৷\u09e4\u09e5:\u200c\u200d\u200d  \n\t.?a1\u200b\ufeff"
    chance = random.Random(4)
    for _ in range(10_000):
        raw = "".join(chance.choices(alphabet, k=chance.randint(1, 14)))
        canonical = normalize(raw, "bn")
        if canonical[:1] not in ("।", "॥", "ৎ"):  # whose first token may go without the mark of a word
            assert corpus_tokenizer.encode(raw).ids == corpus_tokenizer.encode(canonical).ids, ascii(raw)


def test_a_space_before_the_danda_after_a_mask_is_dropped(corpus_tokenizer: Tokenizer) -> None:
    assert corpus_tokenizer.encode("লাল [MASK] ।").ids == corpus_tokenizer.encode("লাল [MASK]।").ids


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
    assert train_tokenizer(with_file(corpus_spec, tmp_path / "a.txt")).get_vocab_size() < 150


def test_characters_of_other_scripts_take_no_row_when_rare(corpus_spec: RunSpec, tmp_path: Path) -> None:
    lines = ["লাল কাঁথা সেলাই হলো নদীর ঘাটে।" * 40] * 1_000 + ["লাল 漢 কাঁথা।"]
    (tmp_path / "a.txt").write_text("\n".join(lines), encoding="utf-8")
    spec = with_file(corpus_spec, tmp_path / "a.txt")
    tokenizer = train_tokenizer(spec.model_copy(update={"tokenizer": TokenizerSpec(vocab_size=150)}))
    assert tokenizer.token_to_id("漢") is None
    assert tokenizer.encode("লাল 漢").ids.count(UNK_ID) == 1


def test_digits_quotes_and_dandas_are_known_even_if_the_corpus_has_none(
    corpus_spec: RunSpec, corpus_tokenizer: Tokenizer, corpus_texts: list[str], tmp_path: Path
) -> None:
    text = "“৭৬২৩” ‘z’ 0479 ॥ #{}~ – —"
    assert not set("৭৬২৩“॥0z") & set("".join(corpus_texts))
    assert UNK_ID not in corpus_tokenizer.encode(text).ids
    (tmp_path / "a.txt").write_text("लाल कंबल सिल गया।\n" * 10, encoding="utf-8")
    hindi = train_tokenizer(with_file(corpus_spec, tmp_path / "a.txt").model_copy(update={"language": "hi"}))
    assert UNK_ID not in hindi.encode("“z” 0479 #").ids
    assert hindi.token_to_id("৭") is None


def test_a_vocabulary_smaller_than_the_alphabet_is_refused(corpus_spec: RunSpec) -> None:
    small = corpus_spec.model_copy(update={"tokenizer": TokenizerSpec(vocab_size=120)})
    with pytest.raises(SpecError, match=r"tokenizer\.vocab_size: 120 .* give at least (\d+)") as caught:
        train_tokenizer(small)
    least = int(str(caught.value).split()[-1])
    enough = small.model_copy(update={"tokenizer": TokenizerSpec(vocab_size=least)})
    assert train_tokenizer(enough).get_vocab_size() == least


def test_training_says_how_far_it_is(corpus_spec: RunSpec) -> None:
    said: list[str] = []
    train_tokenizer(corpus_spec, said.append)
    assert "0 others are too rare" in said[0]
    assert said[-1].startswith("500 documents read")


def change(tokenizer: Tokenizer, **changes: object) -> Tokenizer:
    content = json.loads(tokenizer.to_str())
    content["model"] |= changes.pop("model", {})
    return Tokenizer.from_str(json.dumps(content | changes))


def test_a_tokenizer_of_the_spec_fits(corpus_spec: RunSpec, corpus_tokenizer: Tokenizer, tmp_path: Path) -> None:
    save_tokenizer(corpus_tokenizer, tmp_path / "made.json")
    check_tokenizer(read_tokenizer(tmp_path / "made.json"), corpus_spec, tmp_path / "made.json")


def test_a_tokenizer_that_does_not_fit_is_refused(corpus_spec: RunSpec, corpus_tokenizer: Tokenizer) -> None:
    vocab = json.loads(corpus_tokenizer.to_str())["model"]["vocab"]
    for other, problem in [
        (change(corpus_tokenizer, normalizer={"type": "NFKC"}), "normalizer"),
        (change(corpus_tokenizer, pre_tokenizer={"type": "Whitespace"}), "pre_tokenizer"),
        (change(corpus_tokenizer, post_processor=None), "post_processor"),
        (change(corpus_tokenizer, model={"byte_fallback": True}), "model"),
        (change(corpus_tokenizer, added_tokens=[]), "added_tokens"),
        (change(corpus_tokenizer, model={"vocab": [*vocab, vocab[9]]}), "stand there twice"),
        (change(corpus_tokenizer, model={"vocab": [*vocab, ["আরো", -9.0]]}), "151 pieces, more than"),
        (Tokenizer(models.WordLevel({"<unk>": 0}, "<unk>")), "model"),
    ]:
        with pytest.raises(TokenizerError, match=problem) as caught:
            check_tokenizer(other, corpus_spec, Path("other.json"))
        assert str(caught.value).startswith("other.json: ")


def test_one_of_another_language_does_not_fit(corpus_spec: RunSpec, corpus_tokenizer: Tokenizer) -> None:
    with pytest.raises(TokenizerError, match="language hi"):
        check_tokenizer(corpus_tokenizer, corpus_spec.model_copy(update={"language": "hi"}), Path("bn.json"))


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
