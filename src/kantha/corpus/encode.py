"""Sentences to token ids, in bulk."""

import json
import re
from collections.abc import Sequence

import numpy as np
from tokenizers import Tokenizer

_WORDS_AT_ONCE = 64
_WORDS_KEPT = 500_000  # until all are forgotten; about 100 MB
# A word with the space before it, or one punctuation mark. Every border is one of the tokenizer's own, which splits at
# spaces and isolates punctuation.
_MARKS = r"!-/:-@\[-`{-~।॥‘’“”–—…"
_WORD = re.compile(f" ?[^ {_MARKS}]+| ?[{_MARKS}]| ")


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
        self._forget()

    def _forget(self) -> None:
        self._known: dict[str, int] = {}
        self._ids = np.empty(0, np.int32)  # of all known words, one after the other
        self._starts = np.empty(0, np.int64)
        self._lengths = np.empty(0, np.int64)

    def encode(self, sentences: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Returns (int32 ids of all sentences, one after the other; int64 number of ids of each)."""
        words: list[str] = []
        counts = []
        for sentence in sentences:
            found = _WORD.findall(" " + sentence)
            words += found
            counts.append(len(found))
        if len(self._known) > _WORDS_KEPT:
            self._forget()
        if new := set(words) - self._known.keys():
            self._learn(list(new))
        index = np.fromiter(map(self._known.__getitem__, words), np.int64, len(words))
        lengths = self._lengths[index]
        ends = np.cumsum(lengths)
        positions = np.arange(ends[-1] if len(ends) else 0) + np.repeat(self._starts[index] - ends + lengths, lengths)
        words_before = np.cumsum(counts, dtype=np.int64)
        tokens_before = np.concatenate([[0], ends])[words_before]
        return self._ids[positions], np.diff(tokens_before, prepend=0)

    def _learn(self, words: list[str]) -> None:
        # many words in one text, which costs less than a text for each, and texts in batches, for the threads
        texts = [words[i : i + _WORDS_AT_ONCE] for i in range(0, len(words), _WORDS_AT_ONCE)]
        encoded = self._tokenizer.encode_batch(texts, is_pretokenized=True, add_special_tokens=False)
        lengths = np.concatenate(
            [
                np.bincount(np.array(encoding.word_ids, np.int64), minlength=len(text))
                for encoding, text in zip(encoded, texts, strict=True)
            ]
        )
        starts = len(self._ids) + np.cumsum(lengths) - lengths
        self._known.update(zip(words, range(len(self._known), len(self._known) + len(words)), strict=True))
        self._ids = np.concatenate([self._ids, *(np.array(encoding.ids, np.int32) for encoding in encoded)])
        self._starts = np.concatenate([self._starts, starts])
        self._lengths = np.concatenate([self._lengths, lengths])
