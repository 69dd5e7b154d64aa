"""Sentences to token ids, in bulk."""

import json
import re
from collections.abc import Sequence
from itertools import chain

import numpy as np
from tokenizers import Tokenizer

_WORDS_KEPT = 500_000  # until all are forgotten; about 100 MB
# A word with the space before it, or one punctuation mark. Every border is one of the tokenizer's own, which splits at
# spaces and isolates punctuation. A line break is no part of a sentence: it stands between two.
_MARKS = r"!-/:-@\[-`{-~।॥‘’“”–—…"
_WORD = re.compile(f" ?[^ \n{_MARKS}]+| ?[{_MARKS}]|[ \n]")
_BREAK = "\n"
# A word of lower-case Latin and Bengali letters, whose marks and joiners are no punctuation: nothing is left to be done
# but by the model itself, which takes half as long alone. That is most words of a Bengali text.
_PLAIN_WORD = re.compile(" ?[a-z\u0980-\u09e3\u09f0\u09f1\u200c\u200d]+")


class _Numbers(dict[str, int]):
    """Gives every word that it is asked for the next number."""

    def __missing__(self, word: str) -> int:
        self[word] = number = len(self)
        return number


class SentenceEncoder:
    """Tokenizes each distinct word once and looks it up from then on: text repeats its words.

    Unigram tokenizes what its pre-tokenizer has split independently of what stands around it, so the ids are those of
    whole sentences. Of the tokenizer's normaliser only the lower case is left: sentences are normalised already.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        """:param tokenizer: as `train_tokenizer` makes it"""
        parts = json.loads(tokenizer.to_str())
        lowers = '"Lowercase"' in json.dumps(parts["normalizer"])
        parts["post_processor"] = None
        parts["normalizer"] = {"type": "Lowercase"} if lowers else None
        for splitter in parts["pre_tokenizer"]["pretokenizers"]:
            if splitter["type"] == "Metaspace":
                splitter["prepend_scheme"] = "never"  # a word comes with its space
        self._tokenizer = Tokenizer.from_str(json.dumps(parts))
        self._model = self._tokenizer.model
        self._forget()

    def _forget(self) -> None:
        self._numbers = _Numbers({_BREAK: 0})
        self._ids = np.empty(0, np.int32)  # of all known words, one after the other
        self._starts = np.zeros(1, np.int64)
        self._lengths = np.zeros(1, np.int64)

    def encode(self, sentences: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Returns (int32 ids of all sentences, one after the other; int64 number of ids of each).

        :param sentences: normalised, without line breaks
        """
        if not sentences:
            return np.empty(0, np.int32), np.empty(0, np.int64)
        if len(self._numbers) > _WORDS_KEPT:
            self._forget()
        words = _WORD.findall(" " + f"{_BREAK} ".join(sentences) + _BREAK)
        known = len(self._numbers)
        numbers = np.fromiter(map(self._numbers.__getitem__, words), np.int64, len(words))
        if len(self._numbers) > known:
            new = np.flatnonzero(numbers >= known)
            _, first = np.unique(numbers[new], return_index=True)
            self._learn([words[place] for place in new[first]])
        lengths = self._lengths[numbers]
        ends = np.cumsum(lengths)[numbers == self._numbers[_BREAK]]
        return self._ids[ranges(self._starts[numbers], lengths)], np.diff(ends, prepend=0)

    def _learn(self, words: Sequence[str]) -> None:
        ids = [self._tokenize(word) for word in words]
        lengths = np.array([len(some) for some in ids])
        self._starts = np.append(self._starts, len(self._ids) + np.cumsum(lengths) - lengths)
        self._lengths = np.append(self._lengths, lengths)
        self._ids = np.append(self._ids, np.fromiter(chain.from_iterable(ids), np.int32))

    def _tokenize(self, word: str) -> list[int]:
        if _PLAIN_WORD.fullmatch(word):
            return [token.id for token in self._model.tokenize(word.replace(" ", "▁"))]
        return self._tokenizer.encode(word, add_special_tokens=False).ids


def ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """start, start + 1, … start + length - 1 for each start and its length, one after the other; int64."""
    ends = np.cumsum(lengths)
    return np.arange(ends[-1] if len(ends) else 0) + np.repeat(starts - ends + lengths, lengths)
