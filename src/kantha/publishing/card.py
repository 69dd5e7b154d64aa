"""The model card: what the run's spec and ledger know of the model, as the README.md of its folder.

Names, goals and sentences come from strangers, and the card is shown as Markdown and HTML: all of them go through
`_text` or `_code`. The block of YAML at the top is made by `huggingface_hub`.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from huggingface_hub import EvalResult, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from kantha import __version__
from kantha.errors import printable
from kantha.evaluation import FilledMask
from kantha.publishing.picture import HeldoutLoss, RoundLoss
from kantha.publishing.scores import Metric, Score
from kantha.spec import FileSource, HuggingFaceSource, RunSpec, ScheduleState, ShobdoSource, Source

_HOUR = 3600.0
_MOST_NAMES = 20  # of the poll
_BEGINNING = ScheduleState()
_OPTIMIZERS = {"lamb": "LAMB (You et al. 2020)", "adamw": "AdamW (Loshchilov and Hutter 2019)"}


@dataclass(frozen=True)
class Contributor:
    """One person, under the name that this person chose to be shown by."""

    name: str | None  # None: hidden, or gone for good
    samples: int
    seconds: float  # spent computing


@dataclass(frozen=True)
class NamePoll:
    """What the community chose as the model's name: the final counts."""

    votes: Sequence[tuple[str, int]]  # by name, most first
    voters: int


@dataclass(frozen=True)
class TrainingFacts:
    """What was measured up to the round of the model."""

    losses: Sequence[RoundLoss]  # of the rounds that are known, oldest first
    heldout: Sequence[HeldoutLoss]  # of the checkpoints that were measured, oldest first
    samples: int
    failed_rounds: int  # that no group could finish at first
    began: float | None  # when the first and the last round were finished, seconds since 1970
    ended: float | None
    computing_share: float | None  # of the volunteers' time
    seconds_by_device: Mapping[str | None, float]  # spent computing; None: on what is not known
    contributors: Sequence[Contributor]  # most samples first
    name_poll: NamePoll | None = None  # None: there was none, or it has not closed


@dataclass(frozen=True)
class Model:
    """The model that the card is of."""

    spec: RunSpec
    round: int
    parameters: int
    schedule: ScheduleState = _BEGINNING  # where it was taken
    examples: Sequence[FilledMask] = ()  # what it fills in, on held-out sentences
    repository: str | None = None  # its name on the hub


def write_card(model: Model, facts: TrainingFacts | None, scores: Sequence[Score], picture: str | None) -> str:
    """The card as Markdown under a block of YAML.

    :param facts: None where only a checkpoint is at hand, and no ledger
    :param picture: name of the file with the training curves, next to the card
    """
    parts = [
        *_introduction(model, facts),
        *(_name(facts.name_poll) if facts and facts.name_poll else ()),
        *_usage(model),
        *_examples(model.examples),
        *_scores(scores),
        *_data(model.spec),
        *_recipe(model),
        *(_training(facts, model.round, picture) if facts else ()),
        *(_hours(facts) if facts else ()),
        *(_contributors(facts.contributors) if facts else ()),
        f"Run fingerprint `{model.spec.fingerprint}`, round {model.round}, Kantha {__version__}.",
    ]
    return f"---\n{_metadata(model.spec, scores).to_yaml()}\n---\n" + "\n\n".join(parts) + "\n"


# ---- what strangers wrote

_MEANT_AS_MARKUP = re.compile(r"[\\`*_\[\]|~#$]")
_STARTS_A_BLOCK = re.compile(r"^(\d*)([-+=.)])")


def _text(text: str) -> str:
    """As plain text of one line, whatever it is in Markdown or HTML."""
    line = _MEANT_AS_MARKUP.sub(r"\\\g<0>", printable(text).strip())
    line = line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return _STARTS_A_BLOCK.sub(r"\1\\\2", line)


def _code(text: str) -> str:
    """As code, in which not even an address becomes a link. A vertical bar, which would end the cell of a table, cannot
    be escaped there after a backslash: it becomes a broken one."""
    line = printable(text).replace("|", "¦")
    fence = "`" * (1 + max(map(len, re.findall("`+", line)), default=0))
    space = " " if not line or "`" in (line[0], line[-1]) or line != line.strip() else ""
    return f"{fence}{space}{line}{space}{fence}"


# ---- the parts


def _metadata(spec: RunSpec, scores: Sequence[Score]) -> ModelCardData:
    datasets = (source.name for source in spec.data.sources if isinstance(source, HuggingFaceSource))
    results = [
        EvalResult(
            task_type=printable(score.type or score.task),
            dataset_type=printable(score.dataset or score.task),
            dataset_name=printable(score.task),
            metric_type=printable(name),
            metric_name=printable(f"{name} ({score.method})") if score.method else None,
            metric_value=metric.mean,
        )
        for score in scores
        for name, metric in score.metrics.items()
    ]
    return ModelCardData(
        language=spec.language,
        library_name="transformers",
        pipeline_tag="fill-mask",
        tags=["albert", "kantha"],
        datasets=sorted({name for name in datasets if _is_repository(name)}) or None,
        metrics=sorted({printable(name) for score in scores for name in score.metrics}) or None,
        model_name=printable(spec.name) if results else None,
        eval_results=results or None,
    )


def _introduction(model: Model, facts: TrainingFacts | None) -> Iterator[str]:
    spec = model.spec
    yield f"# {_text(spec.name)}"
    if spec.goal.strip():
        yield _text(spec.goal)
    people = f"{len(facts.contributors)} {_plural(len(facts.contributors), 'volunteer')}" if facts else "volunteers"
    yield (
        f"An ALBERT with {_millions(model.parameters)} parameters for the language `{spec.language}`, which fills in "
        f"masked words. It was trained from nothing by {people}, with "
        f"[Kantha](https://pypi.org/project/kantha/): {model.round:,} {_plural(model.round, 'round')} of about "
        f"{spec.swarm.target_batch_size:,} examples each."
    )


def _name(poll: NamePoll) -> Iterator[str]:
    most = poll.votes[0][1] if poll.votes else 0
    if not most:
        return
    chosen = [_text(name) for name, votes in poll.votes if votes == most]
    took_part = f"{poll.voters:,} {_plural(poll.voters, 'member')} voted"
    yield "## Its name"
    if len(chosen) == 1:
        yield f"Its community named it **{chosen[0]}**; {took_part}, each for as many names as they liked."
    else:
        yield f"{', '.join(chosen)} had as many votes; {took_part}, each for as many names as they liked."
    yield _table(("name", "votes"), ((_code(name), f"{votes:,}") for name, votes in poll.votes[:_MOST_NAMES]))


def _usage(model: Model) -> Iterator[str]:
    sentence = model.examples[0].sentence if model.examples else "আমি [MASK] যাই।"
    yield "## How to use it"
    yield (
        "```python\n"
        "from transformers import pipeline\n\n"
        f'fill = pipeline("fill-mask", "{model.repository or "PATH-OF-THIS-FOLDER"}")\n'
        f"fill({json.dumps(sentence, ensure_ascii=False)})\n"
        "```"
    )


def _examples(examples: Sequence[FilledMask]) -> Iterator[str]:
    if examples:
        yield "## What it fills in"
        yield "Sentences that it was not trained on, one word of each masked; good and bad guesses as they came."
        yield _table(
            ("sentence", "the word was", "its guesses, best first"),
            (
                (
                    _code(example.sentence),
                    _code(example.word),
                    ", ".join(_code(guess or "␣") for guess in example.guesses),
                )
                for example in examples
            ),
        )


def _scores(scores: Sequence[Score]) -> Iterator[str]:
    if scores:
        yield "## Scores"
        yield _table(
            ("task", "method", "metric", "mean ± standard deviation", "repetitions"),
            (
                (_text(score.task), _text(score.method), _text(name), _spread(metric), str(metric.n or ""))
                for score in scores
                for name, metric in score.metrics.items()
            ),
        )


def _spread(metric: Metric) -> str:
    return f"{metric.mean:.4g}" if metric.std is None else f"{metric.mean:.4g} ± {metric.std:.2g}"


def _data(spec: RunSpec) -> Iterator[str]:
    weights = sum(source.weight for source in spec.data.sources)
    yield "## Data"
    yield _table(
        ("source", "share", "details"),
        (
            (_source_name(source), f"{source.weight / weights:.1%}", _source_details(source))
            for source in spec.data.sources
        ),
    )
    yield (
        f"Held out for measuring, and never trained on: {spec.data.heldout_share:.2%} of the documents, chosen by the "
        "hash of their text."
    )


def _source_name(source: Source) -> str:
    match source:
        case ShobdoSource():
            return "the dictionary [shobdo](https://pypi.org/project/shobdo/)"
        case FileSource():
            return _code(re.split(r"[/\\]", source.path)[-1])  # where it lay is nobody's business
        case HuggingFaceSource():
            name = _code(source.name)
            return f"[{name}](https://huggingface.co/datasets/{source.name})" if _is_repository(source.name) else name


def _source_details(source: Source) -> str:
    match source:
        case ShobdoSource():
            return "meanings and example sentences, an entry a document"
        case FileSource():
            return "a file that every volunteer had"
        case HuggingFaceSource():
            details = {
                "configuration": source.config,
                "split": source.split,
                "revision": source.revision,
                "column": source.text_field,
            }
            known = ", ".join(f"{what} {_code(value)}" for what, value in details.items() if value is not None)
            return known if source.revision else f"{known}, the newest revision at the time"


def _recipe(model: Model) -> Iterator[str]:
    spec = model.spec
    shape, optimizer = spec.model, spec.optimizer
    groups = _plural(shape.layer_groups, "group of weights", "groups of weights")
    clipping = f", gradient clipped to norm {optimizer.max_grad_norm:g}" if optimizer.max_grad_norm else ""
    wire = {"none": "in full", "fp16": "in 16 bits", "8bit": "in 8 bits"}[spec.swarm.compression]
    masking = {"token": "single tokens", "word": "whole words", "ngram": "runs of one to three words"}
    yield "## Recipe"
    yield _table(
        ("", ""),
        (
            (
                "network",
                f"ALBERT (Lan et al. 2020): {shape.layers} layers that share {shape.layer_groups} {groups}, "
                f"embedding {shape.embedding_size}, hidden {shape.hidden_size}, feed-forward "
                f"{shape.intermediate_size}, {shape.attention_heads} heads, {_code(shape.activation)}, dropout "
                f"{shape.dropout:g}",
            ),
            ("parameters", f"{model.parameters:,}"),
            (
                "tokenizer",
                f"Unigram (Kudo 2018), {spec.tokenizer.vocab_size:,} pieces, trained on up to "
                f"{spec.tokenizer.training_documents:,} documents",
            ),
            (
                "objective",
                f"{spec.objective.masked_share:.0%} of the tokens masked, as {masking[spec.objective.masking]}; "
                "sentence order, "
                f"{spec.objective.swapped_share:.0%} of the pairs swapped",
            ),
            ("example", f"{spec.data.sequence_length} tokens; the model reads up to {shape.max_positions}"),
            ("batch", _batch(spec)),
            (
                "optimizer",
                f"{_OPTIMIZERS[optimizer.name]}: learning rate {optimizer.learning_rate:g}, betas {optimizer.beta1:g} "
                f"and {optimizer.beta2:g}, epsilon {optimizer.epsilon:g}, weight decay "
                f"{optimizer.weight_decay:g}{clipping}",
            ),
            (
                "schedule",
                _schedule(spec, model.schedule, model.round),
            ),
            ("averaging", f"gradients, weighted by samples, {wire}"),
            ("seed", str(spec.seed)),
        ),
    )


def _batch(spec: RunSpec) -> str:
    full, schedule = spec.swarm.target_batch_size, spec.schedule
    growing = (
        f", growing from {schedule.first_batch_size:,} over the first {schedule.ramp_samples:,}"
        if schedule.ramp_samples
        else ""
    )
    return f"about {full:,} examples from all volunteers together{growing}"


def _schedule(spec: RunSpec, state: ScheduleState, round_number: int) -> str:
    warmup = f"linear warm-up over {spec.schedule.warmup_samples:,} examples" if spec.schedule.warmup_samples else ""
    phases = [warmup or "no warm-up", "then constant"]
    if state.annealed is not None:
        phases.append(f"annealed as 1 − √x over the last {state.anneal_samples:,}")
        if not state.is_finished:
            phases[-1] += f", of which {state.annealed:.0%} are done"
    return f"{', '.join(phases)}; this is the model after round {round_number:,}, {state.samples:,} examples"


def _training(facts: TrainingFacts, round_number: int, picture: str | None) -> Iterator[str]:
    yield "## Training"
    if not facts.contributors:
        yield "No round was finished: these are the weights that the run began with."
        return
    seconds = sum(person.seconds for person in facts.contributors)
    rows = [
        ("rounds", f"{round_number:,}"),
        ("of these, tried again because no group could finish them at first", f"{facts.failed_rounds:,}"),
        ("examples", f"{facts.samples:,}"),
        ("volunteers", f"{len(facts.contributors):,}"),
        ("their time computing", _hours_of(seconds)),
    ]
    if facts.computing_share is not None:
        rows.append(("share of their time in which they computed", f"{facts.computing_share:.1%}"))
    if facts.began is not None and facts.ended is not None:
        rows.append(("first round finished", _moment(facts.began)))
        rows.append(("last round finished", _moment(facts.ended)))
    if facts.losses:
        last = facts.losses[-1]
        rows.append(
            (f"training loss of round {last.round:,}", f"{last.mlm:.3f} a masked token, {last.sop:.3f} a sentence pair")
        )
    if facts.heldout:
        measured = facts.heldout[-1]
        rows.append(
            (
                f"loss of the model after round {measured.round:,} on held-out text",
                f"{measured.mlm:.3f} a masked token ({measured.mlm_accuracy:.1%} guessed right), {measured.sop:.3f} a "
                f"sentence pair ({measured.sop_accuracy:.1%} guessed right); {measured.pairs:,} examples",
            )
        )
    yield _table(("", ""), rows)
    if picture:
        yield f"![Loss by round]({picture})"


def _hours(facts: TrainingFacts) -> Iterator[str]:
    if facts.seconds_by_device:
        yield "## Hours and carbon"
        yield _table(
            ("device", "time computing"),
            (
                (_code(device) if device is not None else "not known", _hours_of(seconds))
                for device, seconds in facts.seconds_by_device.items()
            ),
        )
        yield "Times are what the volunteers' programs reported. Energy and carbon were not measured."


def _contributors(contributors: Sequence[Contributor]) -> Iterator[str]:
    if contributors:
        yield "## Who made it"
        yield "By the names that they chose, most examples first. Thank you!"
        rows = [
            (_code(person.name), f"{person.samples:,}", _hours_of(person.seconds))
            for person in contributors
            if person.name is not None
        ]
        if rows:
            yield _table(("volunteer", "examples", "time computing"), rows)
        if hidden := [person for person in contributors if person.name is None]:
            samples = sum(person.samples for person in hidden)
            hours = _hours_of(sum(person.seconds for person in hidden))
            yield (
                f"And {len(hidden):,} more who did not want to be named, with {samples:,} "
                f"{_plural(samples, 'example')} in {hours}."
            )


# ---- small things


def _table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = (headings, ["---"] * len(headings), *rows)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _is_repository(name: str) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def _plural(count: int, one: str, many: str = "") -> str:
    return one if count == 1 else many or f"{one}s"


def _millions(count: int) -> str:
    return f"{count / 1e6:.1f} million" if count >= 1e5 else f"{count:,}"


def _hours_of(seconds: float) -> str:
    return f"{seconds / _HOUR:,.1f} hours" if seconds >= _HOUR else f"{seconds / 60:.1f} minutes"


def _moment(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M UTC")
