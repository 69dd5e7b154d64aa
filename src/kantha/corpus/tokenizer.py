"""The run's tokenizer: Unigram (Kudo 2018, arXiv 1804.10959), trained once, then the same file for every peer."""

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from kantha.corpus.normalize import split_sentences
from kantha.corpus.sources import is_heldout, mix, read_documents
from kantha.errors import CorpusError, DigestError, RunDirectoryError, StorageError
from kantha.spec import RunSpec

SPECIAL_TOKENS = ("<pad>", "<unk>", "[CLS]", "[SEP]", "[MASK]")
PAD_ID, UNK_ID, CLS_ID, SEP_ID, MASK_ID = range(5)

# The trainer gives every character it meets a row of the vocabulary. On web text that is thousands of rows for
# characters of other scripts that no model of this size can learn, so rarer ones stay unknown.
_RAREST_CHARACTER = 1e-6  # share of all characters
_ALPHABET_DOCUMENTS = 5_000


def train_tokenizer(spec: RunSpec) -> Tokenizer:
    """Train the tokenizer of a run on its documents, those held out excepted, mixed by the sources' weights.

    The ids 0 to 4 are `SPECIAL_TOKENS`. A small corpus gives fewer pieces than `vocab_size`. The same spec and corpus
    give the same tokenizer, byte for byte. Raises `CorpusError` if the sources have no text, and what `read_documents`
    raises.
    """
    documents = islice(_training_documents(spec), spec.tokenizer.training_documents)
    sample = list(islice(documents, _ALPHABET_DOCUMENTS))
    if not sample:
        raise CorpusError("the sources have no document to train a tokenizer on; check `data.sources` in the run spec")
    unknown = re.compile(f"[^{re.escape(''.join(_alphabet(sample)))}]+")
    sentences = (
        unknown.sub(" ", sentence.lower())
        for document in chain(sample, documents)
        for sentence in split_sentences(document, spec.language)
    )
    tokenizer = Tokenizer(models.Unigram())
    # The normaliser stands in the file so that whoever loads it with plain `transformers` gets the same ids for raw
    # text. Not `Nmt`, which would turn the joiners inside Bengali words into spaces.
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Metaspace(prepend_scheme="first"),  # not after [MASK], where "।" follows as often as a word
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.Punctuation(),
        ]
    )
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    tokenizer.train_from_iterator(
        sentences,
        trainers.UnigramTrainer(
            vocab_size=spec.tokenizer.vocab_size,
            special_tokens=[AddedToken(token, lstrip=token == "[MASK]", normalized=False) for token in SPECIAL_TOKENS],
            initial_alphabet=["\u200c", "\u200d"],  # however rare, a joiner must not make a Bengali word unknown
            unk_token=SPECIAL_TOKENS[UNK_ID],
            show_progress=False,
        ),
    )
    pieces = json.loads(tokenizer.to_str())["model"]["vocab"]
    tokenizer.model = models.Unigram(_in_fixed_order([(piece, score) for piece, score in pieces]), UNK_ID)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", CLS_ID), ("[SEP]", SEP_ID)],
    )
    return tokenizer


def _training_documents(spec: RunSpec) -> Iterator[str]:
    sources = spec.data.sources
    parts = [read_documents(source, spec.language, spec.seed, spec.data.shuffle_buffer) for source in sources]
    for document in mix(parts, [source.weight for source in sources], spec.seed):
        if not is_heldout(document, spec.data.heldout_share):
            yield document


def _alphabet(documents: Iterable[str]) -> list[str]:
    counts: Counter[str] = Counter()
    for document in documents:
        counts.update(document.lower())
    least = _RAREST_CHARACTER * counts.total()
    return sorted(character for character, count in counts.items() if count >= least)


def _in_fixed_order(pieces: list[tuple[str, float]]) -> list[tuple[str, float]]:
    """Take out of trained pieces, special ones first, what chance decides in a trainer that sums in parallel.

    That is the last bits of the scores, and the order in which rare single characters are appended, each 0.0001 above
    the one before: these all get the lowest score.
    """
    special, trained = pieces[: len(SPECIAL_TOKENS)], pieces[len(SPECIAL_TOKENS) :]
    lowest = min((score for piece, score in trained if len(piece) > 1), default=-math.inf)
    appended = lowest + 1e-4 * (1 + sum(len(piece) == 1 for piece, _ in trained))
    scored = [(piece, round(lowest if len(piece) == 1 and score <= appended else score, 6)) for piece, score in trained]
    return [(piece, score) for piece, score in special] + sorted(scored, key=lambda scored: (-scored[1], scored[0]))


def save_tokenizer(tokenizer: Tokenizer, path: Path) -> str:
    """Write the tokenizer as `tokenizer.json` of the `tokenizers` library; return the SHA-256 of the file, in hex.

    Raises `StorageError` if the file cannot be written.
    """
    content = tokenizer.to_str(pretty=True).encode()
    try:
        path.write_bytes(content)
    except OSError as error:
        raise StorageError(
            f"{path}: cannot be written ({error.strerror}); free some space or choose another place"
        ) from None
    return hashlib.sha256(content).hexdigest()


def load_tokenizer(path: Path, sha256: str | None) -> Tokenizer:
    """Read a tokenizer file; with `sha256` (hex) only the one that was announced.

    Raises `DigestError` if the digest differs, `RunDirectoryError` if the file is missing or no tokenizer.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise RunDirectoryError(
            f"{path}: the tokenizer cannot be read ({error.strerror}); put the file back, or create the run anew"
        ) from None
    digest = hashlib.sha256(content).hexdigest()
    if sha256 is not None and digest != sha256:
        raise DigestError(
            f"{path}: the tokenizer has SHA-256 {digest}, the run announced {sha256}; delete the file and join again"
        )
    try:
        return Tokenizer.from_buffer(content)
    except ValueError as error:
        raise RunDirectoryError(
            f"{path}: is no tokenizer ({error}); put the right file back, or create the run anew"
        ) from None
