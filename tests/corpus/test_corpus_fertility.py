import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from kantha.corpus.fertility import measure


@pytest.fixture
def tokenizer() -> Tokenizer:
    """Knows two words whole, and some letters."""
    pieces = ["<unk>", "▁নদী", "▁মাঠ", "▁", "ক", "খ", "।"]
    tokenizer = Tokenizer(models.Unigram([(piece, -1.0) for piece in pieces], 0))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Metaspace(), pre_tokenizers.Punctuation()])
    return tokenizer


def test_every_figure(tokenizer: Tokenizer) -> None:
    # ▁নদী | ▁মাঠ । | ▁ ক খ | ▁ <unk> | ▁ <unk>
    found = measure(tokenizer, ["নদী মাঠ।\nকখ", "ঝ ২"])
    assert found.pieces == 7
    assert found.fertility == 10 / 5
    assert found.whole == 2 / 4  # ২ is no word of letters; a danda does not belong to its word
    assert found.characters == 11 / 10
    assert found.unknown_tokens == 2 / 10
    assert found.unknown_words == 2 / 5
    assert found.alphabet == len(set("নদীমাঠ।কখঝ২"))
    assert {"ঝ": 1, "২": 1}.items() <= found.unknown.items()


def test_words_count_as_often_as_they_stand_there(tokenizer: Tokenizer) -> None:
    assert measure(tokenizer, ["নদী নদী নদী", "কখ"]).fertility == (3 + 3) / 4


def test_padding_and_truncation_of_a_file_do_not_count(tokenizer: Tokenizer) -> None:
    plain = measure(tokenizer, ["নদী কখকখ"])
    tokenizer.enable_padding(length=64)
    tokenizer.enable_truncation(2)
    assert measure(tokenizer, ["নদী কখকখ"]) == plain


def test_a_tokenizer_of_another_kind() -> None:
    wordpiece = Tokenizer(models.WordPiece({"[UNK]": 0, "নদী": 1, "মা": 2, "##ঠ": 3}, unk_token="[UNK]"))
    wordpiece.normalizer = normalizers.NFC()
    wordpiece.pre_tokenizer = pre_tokenizers.Whitespace()
    found = measure(wordpiece, ["নদী মাঠ মাঠ ঝড়"])
    assert found.fertility == (1 + 2 + 2 + 1) / 4
    assert found.whole == 1 / 4  # one unknown token is no piece
    assert found.unknown_words == 1 / 4
