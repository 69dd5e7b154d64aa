"""What is a text about? A fine-tuned model beside a linear one on character n-grams."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence

from transformers import AutoModelForSequenceClassification

from kantha.errors import CorpusError
from kantha.evaluation.finetune import Example, Settings, finetune, load_model, load_tokenizer_for, predict
from kantha.evaluation.labelled import Splits, Text
from kantha.evaluation.results import Score, import_extra

_INVERSE_PENALTIES = (1, 10, 100)  # of the logistic regression; the dev data choose


def evaluate_topic(
    model: str,
    splits: Splits[Text],
    settings: Settings,
    say: Callable[[str], None],
    on_progress: Callable[[str, float], None],
) -> Iterator[Score]:
    """Yield accuracy and macro F1 on the test texts: of the baselines, then of the model once for every seed.

    `model` is a model folder or hub name. `say` hears a line worth keeping, `on_progress` what is being done and the
    share of it that is done. Raises `MissingPackageError`, `RunDirectoryError` where there is no such model, and
    `CorpusError` where the training texts have one topic only.
    """
    topics = sorted({text.topic for text in splits.train})
    if len(topics) < 2:
        raise CorpusError(f"{splits.name}: all training texts have the topic {topics[0]!r}; give two topics or more")
    tokenizer, longest = load_tokenizer_for(model)
    yield _score("most frequent topic", _most_frequent(splits), splits.test)
    on_progress("topic: character TF-IDF", 0.0)
    yield _score("character TF-IDF + logistic regression", _tfidf(splits), splits.test)

    cut = 0

    def encode(texts: Sequence[Text]) -> list[Example]:
        nonlocal cut
        encoded = tokenizer([text.text for text in texts], truncation=True, max_length=longest)
        cut += sum(bool(encoding.overflowing) for encoding in encoded.encodings)
        # a topic that is not in the training texts has no label; nobody learns from dev and test texts, so any will do
        labels = [topics.index(text.topic) if text.topic in topics else 0 for text in texts]
        return [Example(ids, label) for ids, label in zip(encoded["input_ids"], labels, strict=True)]

    train, dev, test = map(encode, (splits.train, splits.dev, splits.test))
    if cut:
        say(f"topic: {cut:,} texts are longer than the {longest} tokens that the model reads, and were cut")
    for seed in range(settings.seeds):
        tuned = finetune(
            load_model(AutoModelForSequenceClassification, model, seed, num_labels=len(topics)),
            train,
            lambda network: _accuracy([topics[label] for label in predict(network, dev)], splits.dev),
            seed,
            settings,
            lambda share, seed=seed: on_progress(f"topic: seed {seed}", share),  # type: ignore[misc]
        )
        score = _score("fine-tuned", [topics[label] for label in predict(tuned.model, test)], splits.test, seed)
        say(
            f"topic, seed {seed}: dev accuracy {tuned.dev_score:.1%} (epoch {tuned.epoch} of {tuned.epochs}), "
            f"test {score.metrics['accuracy']:.1%}"
        )
        yield score


def _score(method: str, predicted: Sequence[str], texts: Sequence[Text], seed: int | None = None) -> Score:
    f1_score = import_extra("sklearn.metrics").f1_score
    macro = f1_score([text.topic for text in texts], predicted, average="macro", zero_division=0)
    return Score(method, {"accuracy": _accuracy(predicted, texts), "macro F1": float(macro)}, seed)


def _accuracy(predicted: Sequence[str], texts: Sequence[Text]) -> float:
    return sum(guess == text.topic for guess, text in zip(predicted, texts, strict=True)) / len(texts)


def _most_frequent(splits: Splits[Text]) -> list[str]:
    [(topic, _)] = Counter(text.topic for text in splits.train).most_common(1)
    return [topic] * len(splits.test)


def _tfidf(splits: Splits[Text]) -> list[str]:
    features = import_extra("sklearn.feature_extraction.text").TfidfVectorizer(
        analyzer="char_wb", ngram_range=(1, 5), sublinear_tf=True
    )
    train = features.fit_transform([text.text for text in splits.train])
    dev, test = (features.transform([text.text for text in part]) for part in (splits.dev, splits.test))
    topics = [text.topic for text in splits.train]
    regression = import_extra("sklearn.linear_model").LogisticRegression
    fitted = [regression(C=inverse, max_iter=1000).fit(train, topics) for inverse in _INVERSE_PENALTIES]
    best = max(fitted, key=lambda model: _accuracy(model.predict(dev), splits.dev))
    return [str(topic) for topic in best.predict(test)]
