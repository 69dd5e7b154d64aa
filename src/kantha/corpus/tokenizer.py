"""The run's tokenizer: Unigram (Kudo 2018, arXiv 1804.10959), trained once, then the same file for every peer."""

import hashlib
import json
import math
import re
import string
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, islice
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from kantha.corpus.normalize import normalizer_of, split_sentences
from kantha.corpus.sources import is_heldout, mix, read_documents
from kantha.errors import CorpusError, DigestError, RunDirectoryError, SpecError, StorageError, TokenizerError
from kantha.spec import RunSpec

SPECIAL_TOKENS = ("<pad>", "<unk>", "[CLS]", "[SEP]", "[MASK]")
PAD_ID, UNK_ID, CLS_ID, SEP_ID, MASK_ID = range(5)

# The trainer gives every character it meets a row of the vocabulary. On web text that is thousands of rows for
# characters of other scripts that no model of this size can learn, so rarer ones stay unknown.
_RAREST_CHARACTER = 1e-6  # share of all characters
_ALPHABET_DOCUMENTS = 5_000
_SAY_DOCUMENTS = 30_000
# However rare they are in a sample, any text may hold these: a digit or a joiner must not make a word unknown.
_ALWAYS = string.digits + string.ascii_lowercase + string.punctuation + "‘’“”–—\u200c\u200d"
_ALWAYS_IN_BENGALI = "০১২৩৪৫৬৭৮৯।॥"


def train_tokenizer(spec: RunSpec, say: Callable[[str], None] = lambda _: None) -> Tokenizer:
    """Train the tokenizer of a run on its documents, those held out excepted, mixed by the sources' weights.

    The ids 0 to 4 are `SPECIAL_TOKENS`. A small corpus gives fewer pieces than `vocab_size`. The same spec and corpus
    give the same tokenizer, byte for byte. `say` is told in a sentence how far it is.

    A character without a piece is `<unk>`: there is no byte fallback. To a tokenizer of the dictionary `shobdo` with
    32,000 pieces, 0.001 to 0.03 % of the tokens are unknown in Bengali news, literature, documentation and SIB-200 (up
    to 0.4 and 0.8 % before `_ALWAYS`); the own held-out entries have 0.004 %. Bytes would take 256 rows for that, 6.4 %
    of the demo's vocabulary and more than its whole alphabet of 150 characters, for pieces too rare to be learned, and
    a masked one of the three of a sign is no word or letter to guess.

    Raises `CorpusError` if the sources have no text, `SpecError` if the vocabulary is smaller than the alphabet, and
    what `read_documents` raises.
    """
    documents = islice(_training_documents(spec), spec.tokenizer.training_documents)
    sample = list(islice(documents, _ALPHABET_DOCUMENTS))
    if not sample:
        raise CorpusError("the sources have no document to train a tokenizer on; check `data.sources` in the run spec")
    alphabet, rare = _alphabet(sample, spec.language)
    say(f"the alphabet has {len(alphabet)} characters; {rare} others are too rare in the text and have no piece")
    # with the mark of a space, and one piece more, without which the trainer does not see that it has enough
    least = len(SPECIAL_TOKENS) + len(alphabet) + 2
    if least > spec.tokenizer.vocab_size:
        problem = f"{spec.tokenizer.vocab_size} pieces are too few for the text's alphabet; give at least {least}"
        raise SpecError("tokenizer.vocab_size", [problem])
    unknown = re.compile(f"[^ {re.escape(''.join(alphabet))}]+")
    tokenizer = untrained_tokenizer(spec.language)
    trained = Tokenizer(models.Unigram())  # without the normaliser: the sentences are normalised
    trained.pre_tokenizer = tokenizer.pre_tokenizer
    trained.train_from_iterator(
        _sentences(chain(sample, documents), unknown, spec, say),
        trainers.UnigramTrainer(
            vocab_size=spec.tokenizer.vocab_size,
            special_tokens=list(SPECIAL_TOKENS),
            initial_alphabet=alphabet,
            unk_token=SPECIAL_TOKENS[UNK_ID],
            show_progress=False,
        ),
    )
    pieces = json.loads(trained.to_str())["model"]["vocab"]
    tokenizer.model = models.Unigram(_in_fixed_order([(piece, score) for piece, score in pieces]), UNK_ID)
    return tokenizer


def untrained_tokenizer(language: str) -> Tokenizer:
    """All of a run's tokenizer but its pieces: these are the special tokens alone."""
    tokenizer = Tokenizer(models.Unigram([(token, 0.0) for token in SPECIAL_TOKENS], UNK_ID))
    tokenizer.add_special_tokens(
        [AddedToken(token, lstrip=token == "[MASK]", normalized=False) for token in SPECIAL_TOKENS]
    )
    # The normaliser stands in the file so that whoever loads it with plain `transformers` gets the same ids for raw
    # text. Not `Nmt`, which would turn the joiners inside Bengali words into spaces.
    tokenizer.normalizer = normalizers.Sequence([normalizer_of(language), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Metaspace(prepend_scheme="first"),  # not after [MASK], where "।" follows as often as a word
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.Punctuation(),
        ]
    )
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", CLS_ID), ("[SEP]", SEP_ID)],
    )
    return tokenizer


def _sentences(
    documents: Iterable[str], unknown: re.Pattern[str], spec: RunSpec, say: Callable[[str], None]
) -> Iterator[str]:
    count = 0
    for count, document in enumerate(documents, 1):
        for sentence in split_sentences(document, spec.language):
            yield unknown.sub(" ", sentence.lower())
        if count % _SAY_DOCUMENTS == 0:
            say(f"{count:,} documents read …")
    say(f"{count:,} documents read; choosing up to {spec.tokenizer.vocab_size:,} pieces …")


def _training_documents(spec: RunSpec) -> Iterator[str]:
    sources = spec.data.sources
    parts = [read_documents(source, spec.language, spec.seed, spec.data.shuffle_buffer) for source in sources]
    for document in mix(parts, [source.weight for source in sources], spec.seed):
        if not is_heldout(document, spec.data.heldout_share):
            yield document


def _alphabet(documents: Iterable[str], language: str) -> tuple[list[str], int]:
    """The characters that get a piece, and how many others there are."""
    counts: Counter[str] = Counter()
    for document in documents:
        counts.update(document.lower())
    least = _RAREST_CHARACTER * counts.total()
    found = {character for character in counts if not character.isspace()}
    alphabet = {character for character in found if counts[character] >= least} | set(_ALWAYS)
    if language == "bn":
        alphabet |= set(_ALWAYS_IN_BENGALI)
    return sorted(alphabet), len(found - alphabet)


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


def read_tokenizer(path: Path) -> Tokenizer:
    """Read anybody's tokenizer.json. Raises `TokenizerError` if the file cannot be read or is none."""
    try:
        return Tokenizer.from_buffer(path.read_bytes())
    except OSError as error:
        problem = f"cannot be read ({error.strerror}); check the path"
    except ValueError as error:
        problem = f"is no tokenizer ({error}); `kantha tokenizer train` writes one"
    raise TokenizerError(f"{path}: {problem}")


def check_tokenizer(tokenizer: Tokenizer, spec: RunSpec, path: Path) -> None:
    """Make sure that a run of `spec` can use a tokenizer: only its pieces may be other than `train_tokenizer` gives.

    All else decides on the ids of raw text, of which `SentenceEncoder` and `transformers` must have the same notion.
    Raises `TokenizerError`, which names `path`.
    """
    found, wanted = json.loads(tokenizer.to_str()), json.loads(untrained_tokenizer(spec.language).to_str())
    pieces = [piece for piece, _ in found["model"].pop("vocab")] if found["model"]["type"] == "Unigram" else []
    wanted["model"].pop("vocab")
    if different := [part for part in wanted if found.get(part) != wanted[part]]:
        raise TokenizerError(
            f"{path}: not as this Kantha makes a tokenizer for language {spec.language} ({', '.join(different)} "
            "differ); make one with `kantha tokenizer train`"
        )
    if tuple(pieces[: len(SPECIAL_TOKENS)]) != SPECIAL_TOKENS or len(set(pieces)) < len(pieces):
        raise TokenizerError(
            f"{path}: its pieces do not begin with {' '.join(SPECIAL_TOKENS)}, or some stand there twice; make one "
            "with `kantha tokenizer train`"
        )
    if len(pieces) > spec.tokenizer.vocab_size:
        raise TokenizerError(
            f"{path}: has {len(pieces):,} pieces, more than tokenizer.vocab_size {spec.tokenizer.vocab_size:,} in the "
            "run spec; raise that, or train a smaller one"
        )
