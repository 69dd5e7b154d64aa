"""Which tokens the model has to guess: single ones, whole words or runs of words, in bulk."""

import string
import unicodedata

import numpy as np
from tokenizers import Tokenizer

from kantha.corpus.encode import ranges
from kantha.corpus.tokenizer import MASK_ID, SPECIAL_TOKENS
from kantha.spec import Masking

_LONGEST_RUN = 3  # words; SpanBERT (Joshi et al. 2020) and ALBERT mask runs of n words with probability ∝ 1/n
_MASK, _RANDOM = 0.8, 0.1  # of the masked tokens; the rest keeps its token (Devlin et al. 2019, section 3.1)


class Masker:
    """Chooses tokens to guess, and what stands in their place.

    Rows are examples of different length, one after the other in flat arrays of N token ids.
    """

    def __init__(self, tokenizer: Tokenizer, share: float, masking: Masking) -> None:
        """:param share: of the tokens that are not special"""
        self._share, self._masking = share, masking
        self._pieces = tokenizer.get_vocab_size()
        names = [str(tokenizer.id_to_token(index)) for index in range(self._pieces)]
        # a piece without the space mark continues a word, unless it is punctuation or a digit, which stand alone
        self._alone = np.array([_is_mark(name) for name in names])
        self._alone[: len(SPECIAL_TOKENS)] = True
        self._starts = self._alone | np.array([name.startswith("▁") for name in names])

    def choose(self, ids: np.ndarray, row_of: np.ndarray, chance: np.random.Generator) -> np.ndarray:
        """[N] bool: which tokens are masked: on average `share` of each row's ordinary ones.

        :param ids: [N] token ids
        :param row_of: [N] the row that each is in, ascending from 0
        """
        ordinary = ids >= len(SPECIAL_TOKENS)
        unit_of = self._units(ids, row_of, chance)  # [N] ascending
        first = np.flatnonzero(np.diff(unit_of, prepend=-1))
        size = np.diff(np.append(first, len(ids)))
        usable = ordinary[first]  # special tokens are units of their own
        first, size = first[usable], size[usable]
        row = row_of[first]
        rows = int(row_of[-1]) + 1
        wanted = self._share * np.bincount(row_of, ordinary, rows)
        whole = np.floor(wanted + chance.random(rows)) if self._masking == "token" else wanted

        order = np.argsort(row + chance.random(len(row)))  # by chance within each row
        size_in_order = size[order]
        before = np.cumsum(size_in_order) - size_in_order
        begins = np.flatnonzero(np.diff(row, prepend=-1))
        before -= np.repeat(before[begins], np.diff(np.append(begins, len(row))))  # only of the same row
        # the unit that crosses the budget is in with the probability that makes the mean right
        taken = chance.random(len(row)) * size_in_order < whole[row] - before
        chosen = order[taken]
        masked = np.zeros(len(ids), bool)
        masked[ranges(first[chosen], size[chosen])] = True
        return masked

    def _units(self, ids: np.ndarray, row_of: np.ndarray, chance: np.random.Generator) -> np.ndarray:
        if self._masking == "token":
            return np.arange(len(ids))
        begins = self._starts[ids]
        begins[1:] |= self._alone[ids[:-1]]
        begins[1:] |= row_of[1:] != row_of[:-1]
        begins[0] = True
        word_of = np.cumsum(begins) - 1
        if self._masking == "word":
            return word_of
        # words are grouped into runs of random length; one ends at a special token, so that none crosses a segment
        words = int(word_of[-1]) + 1
        lengths = 1 / np.arange(1, _LONGEST_RUN + 1)
        runs = chance.choice(np.arange(1, _LONGEST_RUN + 1), words, p=lengths / lengths.sum())
        first = np.zeros(words + _LONGEST_RUN, bool)
        ends = np.cumsum(runs)
        first[ends[ends < words]] = True
        first[0] = True
        special = ids[np.flatnonzero(begins)] < len(SPECIAL_TOKENS)
        first[:words] |= special
        first[1 : words + 1] |= special
        return (np.cumsum(first[:words]) - 1)[word_of]

    def replace(self, ids: np.ndarray, masked: np.ndarray, chance: np.random.Generator) -> np.ndarray:
        """[N] ids with masked tokens replaced: 80 % by [MASK], 10 % by a random ordinary token, 10 % kept."""
        labels = ids[masked]
        kind = chance.random(len(labels))
        other = np.where(
            kind < _MASK + _RANDOM, chance.integers(len(SPECIAL_TOKENS), self._pieces, len(labels)), labels
        )
        replaced = ids.copy()
        replaced[masked] = np.where(kind < _MASK, MASK_ID, other)
        return replaced


def _is_mark(piece: str) -> bool:
    return len(piece) == 1 and (unicodedata.category(piece)[0] in "PN" or piece in string.punctuation)
