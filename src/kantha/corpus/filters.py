"""Which documents do not train, and why."""

import re
from collections import Counter
from collections.abc import Hashable

from kantha.errors import MissingPackageError
from kantha.spec import FilterSpec

# Letters and marks of the scripts that a run's language may have; every other language takes any letter for its own.
_SCRIPTS = {
    "as": "\u0980-\u09ff", "bn": "\u0980-\u09ff", "gu": "\u0a80-\u0aff", "hi": "\u0900-\u097f", "kn": "\u0c80-\u0cff",
    "ml": "\u0d00-\u0d7f", "mr": "\u0900-\u097f", "ne": "\u0900-\u097f", "or": "\u0b00-\u0b7f", "pa": "\u0a00-\u0a7f",
    "ta": "\u0b80-\u0bff", "te": "\u0c00-\u0c7f",
}  # fmt: skip
_ASSAMESE = re.compile("[\u09f0\u09f1]")  # ৰ and ৱ, which Bengali does not have

_SEEN_AT_MOST = 2_000_000  # documents that are remembered, until all are forgotten; 10 to 100 MB
_FALSE_ALARMS = 1e-4  # share of new documents that are taken for seen ones
_PERMUTATIONS, _BANDS = 128, 16  # of the MinHash; two documents with 70 % of their word triples in common are near


class DocumentFilter:
    """Tells what is wrong with a document. Remembers the documents it has been asked about, if duplicates are dropped.

    Near duplicates share a band of their MinHash signatures over runs of three words (Broder 1997; Leskovec et al.,
    Mining of Massive Datasets, section 3.4); what was seen is kept in a Bloom filter, so memory is bounded.

    Raises `MissingPackageError` if duplicates are dropped and the packages for it are not installed.
    """

    def __init__(self, spec: FilterSpec, language: str) -> None:
        self._spec, self._language = spec, language
        script = _SCRIPTS.get(language, "")
        self._own = re.compile(f"[{script}]" if script else r"[^\W\d_]")
        self._other = re.compile(rf"[^\W\d_{script}]" if script else "(?!)")
        if spec.duplicates != "keep":
            try:
                import rbloom
                import rensa
            except ImportError:
                raise MissingPackageError(
                    "the run leaves out duplicates, and a package for it is not installed; run: "
                    "pip install 'kantha[duplicates]'"
                ) from None
            self._minhash = rensa.RMinHash
            self._bloom = rbloom.Bloom
        self._forget()

    def _forget(self) -> None:
        self._asked = 0
        if self._spec.duplicates != "keep":
            entries = _SEEN_AT_MOST * (_BANDS if self._spec.duplicates == "near" else 1)
            self._seen = self._bloom(entries, _FALSE_ALARMS)

    def objection(self, document: str) -> str | None:
        """Why a normalised document does not train; None: it does."""
        spec = self._spec
        if spec.least_letters or spec.script_share:
            own, other = len(self._own.findall(document)), len(self._other.findall(document))
            if own + other < spec.least_letters:
                return "too short"
            if own < spec.script_share * (own + other) or (spec.script_share and self._is_assamese(document)):
                return "another language"
        if spec.repeated_lines < 1 and _repeated_share(document) > spec.repeated_lines:
            return "repeats itself"
        if spec.duplicates != "keep" and self._was_seen(document):
            return "duplicate"
        return None

    def _is_assamese(self, document: str) -> bool:
        return self._language == "bn" and len(_ASSAMESE.findall(document)) > 0.005 * len(document)

    def _was_seen(self, document: str) -> bool:
        self._asked += 1
        if self._asked > _SEEN_AT_MOST:
            self._forget()
        if self._spec.duplicates == "exact":
            keys: list[Hashable] = [document]
        else:
            words = document.split()
            sketch = self._minhash(num_perm=_PERMUTATIONS, seed=0)
            sketch.update([" ".join(words[i : i + 3]) for i in range(max(1, len(words) - 2))])
            digest, rows = sketch.digest(), _PERMUTATIONS // _BANDS
            keys = [(band, *digest[band * rows : (band + 1) * rows]) for band in range(_BANDS)]
        seen = any(key in self._seen for key in keys)
        self._seen.update(keys)
        return seen


def _repeated_share(document: str) -> float:
    """Share of the characters that are in lines which the document has had before."""
    lines = Counter(document.split("\n"))
    return sum(len(line) * (count - 1) for line, count in lines.items()) / max(1, len(document))
