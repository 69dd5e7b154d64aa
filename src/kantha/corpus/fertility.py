"""How well a tokenizer fits a text: measures that any two tokenizers can be compared by, on the same text."""

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from tokenizers import Tokenizer, pre_tokenizers

_MARKS = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])


@dataclass(frozen=True)
class Fertility:
    """What a tokenizer makes of a text whose words stand between white space."""

    pieces: int  # in the vocabulary
    fertility: float  # tokens a word, punctuation included
    whole: float  # share of the words that are one piece; of those of letters alone, their punctuation taken off
    characters: float  # a token; white space does not count
    unknown_tokens: float  # share of the tokens
    unknown_words: float  # share of the words that have such a token
    alphabet: int  # distinct characters in the text
    unknown: Counter[str]  # those of them that the tokenizer has no piece for, and how often they occur


def measure(tokenizer: Tokenizer, documents: Iterable[str]) -> Fertility:
    """Measure a tokenizer on documents; there must be a word in them.

    Each distinct word is tokenized once, with a space before it, which is the same as in a sentence for all tokenizers
    that split at white space. Special tokens are not added.
    """
    words = Counter(word for document in documents for word in document.split())
    letters: Counter[str] = Counter()
    characters: Counter[str] = Counter()
    for word, count in words.items():
        for part, _ in _MARKS.pre_tokenize_str(word):
            if any(map(str.isalpha, part)) and not any(map(str.isdigit, part)):
                letters[part] += count
        for character in word:
            characters[character] += count
    tokenizer, unknown_id = _plain(tokenizer)
    counts = np.array(list(words.values()))
    lengths, unknown = _lengths(tokenizer, words, unknown_id)
    letter_lengths, letter_unknown = _lengths(tokenizer, letters, unknown_id)
    whole = (letter_lengths == 1) & (letter_unknown == 0)
    _, without_piece = _lengths(tokenizer, characters, unknown_id)
    tokens = max(1, int(counts @ lengths))
    return Fertility(
        pieces=tokenizer.get_vocab_size(),
        fertility=tokens / words.total(),
        whole=float(np.array(list(letters.values())) @ whole) / max(1, letters.total()),
        characters=characters.total() / tokens,
        unknown_tokens=float(counts @ unknown) / tokens,
        unknown_words=float(counts @ (unknown > 0)) / words.total(),
        alphabet=len(characters),
        unknown=Counter({c: characters[c] for c, lost in zip(characters, without_piece, strict=True) if lost}),
    )


def _plain(tokenizer: Tokenizer) -> tuple[Tokenizer, int]:
    """A copy that neither pads nor cuts, and the id of its unknown token, -1 if it has none."""
    copy = Tokenizer.from_str(tokenizer.to_str())
    copy.no_padding()
    copy.no_truncation()
    model = json.loads(copy.to_str())["model"]
    name = model.get("unk_token")
    unknown_id = model.get("unk_id") if name is None else copy.token_to_id(name)
    return copy, -1 if unknown_id is None else unknown_id


def _lengths(tokenizer: Tokenizer, words: Iterable[str], unknown_id: int) -> tuple[np.ndarray, np.ndarray]:
    """For each word: (how many tokens, how many of them unknown)."""
    encodings = tokenizer.encode_batch([f" {word}" for word in words], add_special_tokens=False)
    return (
        np.array([len(encoding.ids) for encoding in encodings], np.int64),
        np.array([encoding.ids.count(unknown_id) for encoding in encodings], np.int64),
    )
