"""What a model puts into a blank."""

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AlbertForMaskedLM, PreTrainedTokenizerFast, pipeline

from kantha.corpus import MASK_ID, SPECIAL_TOKENS
from kantha.evaluation import fill_blanks, word_pieces
from kantha.spec import RunSpec
from kantha.training import Replica


@pytest.fixture(scope="module")
def replica(tiny_spec: RunSpec) -> Replica:
    """With weights that are large enough for a model to have an opinion."""
    replica = Replica(tiny_spec)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in replica.parameters:
            parameter.add_(torch.randn(parameter.shape, generator=generator) / 3)
    return replica


def test_the_words_are_those_of_transformers_that_are_words(replica: Replica, tiny_tokenizer: Tokenizer) -> None:
    sentence = "আমার ভাই ___ খুঁজে পেল।"
    [filled] = fill_blanks(replica.model, tiny_tokenizer, [sentence], guesses=5)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tiny_tokenizer, mask_token="[MASK]", pad_token="<pad>")
    # transformers' head for guessing alone, with the same weights
    model = AlbertForMaskedLM(replica.model.config)
    model.load_state_dict(replica.model.state_dict(), strict=False)
    fill = pipeline("fill-mask", model=model, tokenizer=wrapped, top_k=model.config.vocab_size)
    words = word_pieces(tiny_tokenizer)
    expected = [(words[g["token"]], g["score"]) for g in fill(sentence.replace("___", "[MASK]")) if g["token"] in words]
    assert [word for word, _ in filled] == [word for word, _ in expected[:5]]
    assert [share for _, share in filled] == pytest.approx([share for _, share in expected[:5]], rel=1e-4)


def test_only_whole_words_are_candidates(tiny_tokenizer: Tokenizer) -> None:
    words = word_pieces(tiny_tokenizer)
    assert len(words) > 5
    assert not set(words.values()) & set(SPECIAL_TOKENS)
    for number, word in words.items():
        assert tiny_tokenizer.id_to_token(number) == f"▁{word}"
        assert any(character.isalpha() for character in word)
        assert not any(character in "।,.!?▁ " for character in word)


def test_a_sentence_that_is_too_long_before_its_blank_has_no_guess(replica: Replica, tiny_tokenizer: Tokenizer) -> None:
    long = "ইলিশ মাছ " * 30 + "___।"
    assert MASK_ID not in tiny_tokenizer.encode(long).ids
    short, empty = fill_blanks(replica.model, tiny_tokenizer, ["ইলিশ ___।", long])
    assert len(short) == 3
    assert empty == []
