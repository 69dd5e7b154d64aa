"""Who, where, what: entities in sentences. A fine-tuned model beside a conditional random field (CRF)."""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from transformers import AutoModelForTokenClassification, PreTrainedModel, PreTrainedTokenizerFast

from kantha.errors import CorpusError
from kantha.evaluation.finetune import IGNORED, Example, Settings, finetune, load_model, load_tokenizer_for, predict
from kantha.evaluation.labelled import Sentence, Splits
from kantha.evaluation.results import Score, import_extra

_OUTSIDE = "O"
_AFFIXES = range(1, 5)  # lengths of the prefixes and suffixes that the CRF sees, in characters


class TaggedPieces(NamedTuple):
    """A sentence as a model reads it; a word's tag stands at its first piece."""

    example: Example
    first_pieces: list[int | None]
    """[words] where each begins among the tokens; None for a word that is cut off, or has no piece."""


def evaluate_ner(
    model: str,
    splits: Splits[Sentence],
    settings: Settings,
    say: Callable[[str], None],
    on_progress: Callable[[str, float], None],
) -> Iterator[Score]:
    """Yield entity F1, precision and recall on the test sentences: of the baselines, then of the model for every seed.

    An entity counts where its type and both its ends are right, by `seqeval` as the script `conlleval` does it: I-PER
    after O begins an entity. A word that does not fit into the model counts as predicted O. Parameters are those of
    `evaluate_topic`. Raises `MissingPackageError`, `RunDirectoryError` where there is no such model, and `CorpusError`
    where the training sentences have no entity.
    """
    tags = sorted({tag for sentence in splits.train for tag in sentence.tags} | {_OUTSIDE})
    if len(tags) < 2:
        raise CorpusError(f"{splits.name}: the training sentences have no entity; give some that do")
    tokenizer, longest = load_tokenizer_for(model)
    yield _score("usual tag of each word", _most_frequent(splits), splits.test)
    on_progress("ner: CRF", 0.0)
    yield _score("CRF", _crf(splits), splits.test)

    train, dev, test = (tag_pieces(part, tokenizer, longest, tags) for part in (splits.train, splits.dev, splits.test))
    cut = sum(pieces.first_pieces[-1] is None for pieces in (*train, *dev, *test))
    if cut:
        say(f"ner: {cut:,} sentences are longer than the {longest} tokens that the model reads, and were cut")

    def read(network: PreTrainedModel, sentences: Sequence[TaggedPieces]) -> list[list[str]]:
        labels = predict(network, [pieces.example for pieces in sentences])
        return [
            [_OUTSIDE if first is None else tags[row[first]] for first in pieces.first_pieces]
            for row, pieces in zip(labels, sentences, strict=True)
        ]

    for seed in range(settings.seeds):
        tuned = finetune(
            load_model(AutoModelForTokenClassification, model, seed, num_labels=len(tags)),
            [pieces.example for pieces in train],
            lambda network: _score("", read(network, dev), splits.dev).metrics["entity F1"],
            seed,
            settings,
            lambda share, seed=seed: on_progress(f"ner: seed {seed}", share),  # type: ignore[misc]
        )
        score = _score("fine-tuned", read(tuned.model, test), splits.test, seed)
        say(
            f"ner, seed {seed}: dev F1 {tuned.dev_score:.1%} (epoch {tuned.epoch} of {tuned.epochs}), "
            f"test {score.metrics['entity F1']:.1%}"
        )
        yield score


def tag_pieces(
    sentences: Sequence[Sentence], tokenizer: PreTrainedTokenizerFast, longest: int, tags: Sequence[str]
) -> list[TaggedPieces]:
    """Sentences as token ids, at most `longest` each, with the index in `tags` of each word's tag at its first piece.

    A tag that is not in `tags` is ignored; it can only be in dev or test data, whose labels nobody learns from.
    """
    encoded = tokenizer(
        [list(sentence.words) for sentence in sentences], is_split_into_words=True, truncation=True, max_length=longest
    )
    index = {tag: i for i, tag in enumerate(tags)}
    found = []
    for i, (sentence, ids) in enumerate(zip(sentences, encoded["input_ids"], strict=True)):
        first_pieces: list[int | None] = [None] * len(sentence.words)
        labels = [IGNORED] * len(ids)
        for position, word in enumerate(encoded.word_ids(i)):
            if word is not None and first_pieces[word] is None:
                first_pieces[word] = position
                labels[position] = index.get(sentence.tags[word], IGNORED)
        found.append(TaggedPieces(Example(ids, labels), first_pieces))
    return found


def _score(method: str, predicted: list[list[str]], sentences: Sequence[Sentence], seed: int | None = None) -> Score:
    seqeval = import_extra("seqeval.metrics")
    truth = [list(sentence.tags) for sentence in sentences]
    metrics = {
        name: float(measure(truth, predicted, zero_division=0))
        for name, measure in (
            ("entity F1", seqeval.f1_score),
            ("precision", seqeval.precision_score),
            ("recall", seqeval.recall_score),
        )
    }
    return Score(method, metrics, seed)


def _most_frequent(splits: Splits[Sentence]) -> list[list[str]]:
    counts: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for sentence in splits.train:
        for word, tag in zip(sentence.words, sentence.tags, strict=True):
            counts[word][tag] += 1
    usual = {word: tags.most_common(1)[0][0] for word, tags in counts.items()}
    return [[usual.get(word, _OUTSIDE) for word in sentence.words] for sentence in splits.test]


def _crf(splits: Splits[Sentence]) -> list[list[str]]:
    crf = import_extra("sklearn_crfsuite").CRF(c1=0.1, c2=0.1, max_iterations=100, all_possible_transitions=True)
    crf.fit([_features(s.words) for s in splits.train], [list(s.tags) for s in splits.train])
    return [list(tags) for tags in crf.predict([_features(s.words) for s in splits.test])]


def _features(words: Sequence[str]) -> list[list[str]]:
    own = []
    for word in words:
        affixes = [f"{end}={part}" for n in _AFFIXES for end, part in (("prefix", word[:n]), ("suffix", word[-n:]))]
        kind = "digits" if any(map(str.isdigit, word)) else "letters" if any(map(str.isalpha, word)) else "marks"
        own.append([f"word={word}", f"kind={kind}", *affixes])
    return [
        [
            *own[i],
            *([f"-1 {feature}" for feature in own[i - 1]] if i else ["first"]),
            *([f"+1 {feature}" for feature in own[i + 1]] if i + 1 < len(words) else ["last"]),
        ]
        for i in range(len(words))
    ]
