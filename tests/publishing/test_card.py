import re
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from giving import give
from markdown_it import MarkdownIt
from markdown_it.token import Token

from kantha.cli.publish import export_run, training_facts
from kantha.coordinator import ledger as ledger_module
from kantha.coordinator.allowlist import Allowlist, Person, Shown
from kantha.coordinator.database import open_database
from kantha.coordinator.ledger import Ledger
from kantha.coordinator.polls import Polls
from kantha.coordinator.rundir import RunDirectory
from kantha.coordinator.status import HeldoutStatus
from kantha.errors import PublishingError
from kantha.evaluation import FilledMask
from kantha.publishing.card import Contributor, Model, NamePoll, TrainingFacts, write_card
from kantha.publishing.picture import HeldoutLoss, RoundLoss, draw_losses
from kantha.publishing.scores import Metric, Score, load_scores
from kantha.spec import FileSource, HuggingFaceSource, RunSpec, ShobdoSource
from kantha.swarm.membership import Membership
from kantha.swarm.reports import RoundReport
from kantha.training import Replica
from kantha.training.checkpoint import list_checkpoints

HOSTILE = [
    "<script>alert(1)</script>",
    "![x](http://127.0.0.1/x.png)",
    "[click](javascript:alert(1))",
    "https://spam.example",
    "`code` ``more``",
    "a | b | c",
    "end\\",
    "``",
    "---",
    "# heading",
    "1. first",
    "&lt;b&gt; *bold* _it_ ~~no~~ $x$",
    "<!--",
    "\u202egnp.exe",
]
SCORES = [
    Score(
        task="NER",
        method="linear probe",
        type="token-classification",
        dataset="unimelb-nlp/wikiann",
        metrics={"f1": Metric(mean=0.51234, std=0.0123, n=3), "accuracy": Metric(mean=0.9)},
    )
]


def facts(names: Sequence[str] = ("Asha",)) -> TrainingFacts:
    return TrainingFacts(
        losses=[RoundLoss(number, 8.0 - number / 10, 0.7) for number in range(1, 7)],
        heldout=[HeldoutLoss(number, 7.9 - number / 10, 0.65, 0.125, 0.625, 512) for number in (0, 4)],
        samples=384,
        failed_rounds=1,
        began=0.0,
        ended=3600.0,
        computing_share=0.987,
        seconds_by_device={"Tesla T4": 7200.0, None: 90.0},
        contributors=[Contributor(name, 100 - index, 3600.0) for index, name in enumerate(names)],
    )


def card_of(spec: RunSpec, facts: TrainingFacts | None = None, scores: Sequence[Score] = (), **model: Any) -> str:
    return write_card(Model(spec, 6, 12_345_678, **model), facts, scores, "training.png" if facts else None)


def parts_of(card: str) -> tuple[dict[str, Any], str]:
    """Metadata and Markdown."""
    _, metadata, text = re.split("^---\n", card, maxsplit=2, flags=re.MULTILINE)
    return yaml.safe_load(metadata), text


def tokens_of(text: str) -> list[Token]:
    tokens = MarkdownIt("commonmark").enable("table").parse(text)
    return [part for token in tokens for part in (token, *(token.children or ()))]


def cells_of(text: str) -> list[list[str]]:
    """The text of every row of every table, as it is shown."""
    rows: list[list[str]] = []
    for token in MarkdownIt("commonmark").enable("table").parse(text):
        if token.type == "tr_open":
            rows.append([])
        elif token.type == "inline" and rows and token.level > 2:
            rows[-1].append("".join(child.content for child in token.children or ()))
    return rows


def test_who_does_not_want_to_be_named_is_counted_in_one_line(tiny_spec: RunSpec) -> None:
    three = facts(["Asha", "x", "y"])
    [asha, *others] = three.contributors
    hidden = [replace(each, name=None) for each in others]
    _, text = parts_of(card_of(tiny_spec, replace(three, contributors=[asha, *hidden])))
    assert ["Asha", "100", "1.0 hours"] in cells_of(text)
    assert "And 2 more who did not want to be named, with 197 examples in 2.0 hours." in text
    assert ["volunteers", "3"] in cells_of(text)
    _, text = parts_of(card_of(tiny_spec, replace(three, contributors=hidden)))
    assert "And 2 more who did not want" in text


def test_the_card_names_people_as_they_choose(run_path: Path) -> None:
    run = RunDirectory.open(run_path)
    ledger = Ledger(open_database(run))
    allowlist = Allowlist(ledger.database)
    for name, samples in [("asha", 30), ("rafiq", 20), ("mitu", 10), ("kobi", 5)]:
        give(ledger, allowlist, name, (0, samples))
    allowlist.show_as("rafiq", Shown.NICKNAME, "Rooster")
    allowlist.show_as("mitu", Shown.HIDDEN)
    allowlist.forget("kobi")
    ledger.close()
    known = training_facts(run, 1)
    assert [(each.name, each.samples) for each in known.contributors] == [
        ("asha", 30),
        ("Rooster", 20),
        (None, 10),
        (None, 5),
    ]


def test_the_card_names_run_data_recipe_scores_and_contributors(tiny_spec: RunSpec) -> None:
    metadata, text = parts_of(
        card_of(
            tiny_spec,
            facts(["Asha", "আশা"]),
            SCORES,
            examples=[FilledMask("রহিম [MASK] গেল।", "বাড়ি", ["স্কুলে", ""])],
            repository="asha/tiny",
        )
    )
    assert metadata["language"] == "bn"
    assert metadata["pipeline_tag"] == "fill-mask"
    assert metadata["metrics"] == ["accuracy", "f1"]
    [result] = metadata["model-index"][0]["results"]
    assert result["dataset"] == {"name": "NER", "type": "unimelb-nlp/wikiann"}
    assert {metric["type"]: metric["value"] for metric in result["metrics"]} == {"f1": 0.51234, "accuracy": 0.9}
    for part in ("# tiny", "A model for tests.", "12.3 million", '"asha/tiny"', "sentences.txt", tiny_spec.fingerprint):
        assert part in text
    assert str(Path(tiny_spec.data.sources[0].path).parent) not in text
    rows = cells_of(text)
    assert ["রহিম [MASK] গেল।", "বাড়ি", "স্কুলে, ␣"] in rows
    assert ["NER", "linear probe", "f1", "0.5123 ± 0.012", "3"] in rows
    assert ["NER", "linear probe", "accuracy", "0.9", ""] in rows
    assert ["Asha", "100", "1.0 hours"] in rows
    assert ["আশা", "99", "1.0 hours"] in rows
    assert ["Tesla T4", "2.0 hours"] in rows
    assert ["not known", "1.5 minutes"] in rows
    assert [
        "loss of the model after round 4 on held-out text",
        "7.500 a masked token (12.5% guessed right), 0.650 a sentence pair (62.5% guessed right); 512 examples",
    ] in rows
    assert ["first round finished", "1970-01-01 00:00 UTC"] in rows
    assert "co2_eq_emissions" not in metadata
    assert "carbon were not measured" in text


def test_sources_are_named_with_their_share_and_revision(tiny_spec: RunSpec) -> None:
    sources = (
        HuggingFaceSource(
            kind="huggingface", name="wikimedia/wikipedia", config="20231101.bn", revision="ab", weight=3
        ),
        ShobdoSource(kind="shobdo", weight=1),
        HuggingFaceSource(kind="huggingface", name="no](name", weight=1),
    )
    metadata, text = parts_of(
        card_of(tiny_spec.model_copy(update={"data": tiny_spec.data.model_copy(update={"sources": sources})}))
    )
    assert metadata["datasets"] == ["wikimedia/wikipedia"]
    rows = cells_of(text)
    assert [
        "wikimedia/wikipedia",
        "60.0%",
        "configuration 20231101.bn, split train, revision ab, column text",
    ] in rows
    assert ["no](name", "20.0%", "split train, column text, the newest revision at the time"] in rows
    links = {token.attrs["href"] for token in tokens_of(text) if token.type == "link_open"}
    assert "https://huggingface.co/datasets/wikimedia/wikipedia" in links
    assert all(str(link).startswith(("https://pypi.org/", "https://huggingface.co/datasets/wiki")) for link in links)


@pytest.mark.parametrize("text", HOSTILE)
def test_what_strangers_write_stays_text(tiny_spec: RunSpec, text: str) -> None:
    source = FileSource(kind="file", path=f"/home/asha/{text}")
    hostile = tiny_spec.model_copy(
        update={
            "name": text,
            "goal": text,
            "data": tiny_spec.data.model_copy(update={"sources": (source,)}),
        }
    )
    filled = FilledMask(text, text, [text])
    scores = [Score(task=text, method=text, type=text, dataset=text, metrics={text: Metric(mean=1)})]
    metadata, markdown = parts_of(card_of(hostile, facts([text, text]), scores, examples=[filled]))
    plain_metadata, plain = parts_of(card_of(tiny_spec, facts(["x", "x"]), [], examples=[FilledMask("x", "x", ["x"])]))
    tokens = tokens_of(markdown)
    assert not [token for token in tokens if token.type.startswith("html")]
    assert [token.attrs for token in tokens if token.type == "image"] == [{"src": "training.png", "alt": ""}]
    assert len([token for token in tokens if token.type == "link_open"]) == plain.count("](https://")
    assert len([token for token in tokens if token.type == "heading_open"]) == plain.count("\n#") + 2  # name, scores
    shown = text.replace("|", "¦").replace("\u202e", "?")
    assert [row for row in cells_of(markdown) if row[1:] == ["100", "1.0 hours"]] == [[shown, "100", "1.0 hours"]]
    title = tokens[tokens.index(next(token for token in tokens if token.type == "heading_open")) + 1]
    assert "".join(child.content for child in title.children or ()) == text.replace("\u202e", "?")
    assert plain_metadata.items() <= {key: value for key, value in metadata.items() if key != "metrics"}.items()
    assert metadata["model-index"][0]["name"] == text.replace("\u202e", "?")


def test_a_language_that_is_a_word_of_yaml_stays_a_language(tiny_spec: RunSpec) -> None:
    metadata, _ = parts_of(card_of(tiny_spec.model_copy(update={"language": "no"})))
    assert metadata["language"] == "no"


def test_a_run_tells_what_its_ledger_knows_up_to_the_model(run_path: Path, tmp_path: Path) -> None:
    run = RunDirectory.open(run_path)
    run.save_checkpoint(Replica(run.spec), 2)
    ledger = Ledger(run.ledger)
    for peer, name in (("a", "Asha"), ("b", "Asha"), ("c", "Rafiq"), ("d", "Mitu")):
        ledger.add_member(
            Membership(
                serial="0" * 16,
                run=run.spec.fingerprint,
                username=name,
                peer_id=peer,
                service="local",
                roles=("trainer",),
                issued=0,
                expires=100,
            )
        )
    began = time.time()
    for peer, numbers in (("a", (1, 2, 3)), ("b", (2,)), ("c", (1, 2)), ("d", (3,))):
        ledger.add_rounds(
            peer,
            [
                RoundReport(
                    round=number,
                    lineage=f"after {number}",
                    samples=10,
                    seconds=90.0,
                    waited=10.0,
                    mlm_loss_sum=50.0,
                    sop_loss_sum=7.0,
                    peers=2,
                )
                for number in numbers
            ],
        )
    ledger.set_device("a", "Tesla T4")
    ledger.set_device("c", "x86_64 CPU, 2 cores")
    for number in (0, 2, 3):
        ledger.add_heldout(
            HeldoutStatus(
                round=number,
                loss=6.0 + number,
                mlm_loss=5.5 + number,
                mlm_accuracy=0.1,
                sop_loss=0.5,
                sop_accuracy=0.7,
                masked=300,
                pairs=90,
            )
        )
    ledger.mark_failed(2, "too late")
    ledger.mark_failed(3, "too late")
    ledger.close()

    known = training_facts(run, 2)
    assert known.contributors == [Contributor("Asha", 30, 270.0), Contributor("Rafiq", 20, 180.0)]
    assert known.seconds_by_device == {"Tesla T4": 180.0, "x86_64 CPU, 2 cores": 180.0, None: 90.0}
    assert [loss.round for loss in known.losses] == [1, 2]
    assert known.losses[0].mlm == pytest.approx(5.0)
    assert known.heldout == [HeldoutLoss(0, 5.5, 0.5, 0.1, 0.7, 90), HeldoutLoss(2, 7.5, 0.5, 0.1, 0.7, 90)]
    assert (known.samples, known.failed_rounds) == (50, 1)
    assert known.computing_share == pytest.approx(0.9)
    assert known.began is not None
    assert known.ended is not None
    assert began - 1 <= known.began <= known.ended <= time.time()

    export_run(run_path, tmp_path / "model")
    card = (tmp_path / "model" / "README.md").read_text(encoding="utf-8")
    assert "`Asha` | 30" in card
    assert "Mitu" not in card  # took part after this round only
    assert "loss of the model after round 2 on held-out text" in card
    assert "![Loss by round](training.png)" in card
    assert (tmp_path / "model" / "training.png").read_bytes().startswith(b"\x89PNG")

    export_run(list_checkpoints(run.checkpoints)[0], tmp_path / "bare")
    card = (tmp_path / "bare" / "README.md").read_text(encoding="utf-8")
    assert run.spec.fingerprint in card
    assert "Asha" not in card
    assert not (tmp_path / "bare" / "training.png").exists()


def test_a_run_without_a_round_says_so(run_path: Path, tmp_path: Path) -> None:
    Ledger(run_path / "ledger.sqlite").close()
    assert export_run(run_path, tmp_path / "model") == 0
    card = (tmp_path / "model" / "README.md").read_text(encoding="utf-8")
    assert "No round was finished" in card
    assert "0 volunteers" in card


def test_text_that_is_not_at_hand_only_costs_the_examples(run_path: Path, tiny_spec: RunSpec, tmp_path: Path) -> None:
    text = Path(tiny_spec.data.sources[0].path)
    away = text.rename(tmp_path / "away.txt")
    try:
        export_run(run_path, tmp_path / "model")
    finally:
        away.rename(text)
    assert "What it fills in" not in (tmp_path / "model" / "README.md").read_text(encoding="utf-8")
    export_run(run_path, tmp_path / "other")
    assert "What it fills in" in (tmp_path / "other" / "README.md").read_text(encoding="utf-8")


def test_samples_of_unknown_loss_are_in_the_card_and_not_in_its_curve(
    run_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their volunteer was killed before it could report the only round that it took part in."""
    monkeypatch.setattr(ledger_module, "_REPORT_COMES", 0.0)
    run = RunDirectory.open(run_path)
    ledger = Ledger(run.ledger)
    ledger.add_member(
        Membership(
            serial="0" * 16,
            run=run.spec.fingerprint,
            username="Rafiq",
            peer_id="b",
            service="local",
            roles=("trainer",),
            issued=0,
            expires=100,
        )
    )
    ledger.add_result(0, "the first", {"b": 70.0})  # of round 0, which the run's only checkpoint is of
    ledger.stand_in()
    ledger.close()
    known = training_facts(run, 0)
    assert (known.samples, known.losses, known.computing_share) == (70, [], None)
    assert known.contributors == [Contributor("Rafiq", 70, 0.0)]
    export_run(run_path, tmp_path / "model")
    assert "`Rafiq` | 70" in (tmp_path / "model" / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("text", HOSTILE)
def test_a_name_that_the_community_chose_stays_text(tiny_spec: RunSpec, text: str) -> None:
    def with_names(*names: str) -> str:
        poll = NamePoll([(name, 2) for name in names], 3)
        return parts_of(card_of(tiny_spec, replace(facts(), name_poll=poll)))[1]

    for plain, hostile in ((["x"], [text]), (["x", "y"], [text, "y"])):
        found, expected = (tokens_of(with_names(*names)) for names in (hostile, plain))
        assert [token.type for token in found] == [token.type for token in expected]
        assert [child.type for token in found for child in token.children or () if child.type == "link_open"] == [
            child.type for token in expected for child in token.children or () if child.type == "link_open"
        ]


def test_the_card_says_which_name_was_chosen_when_the_poll_has_closed(run_path: Path) -> None:
    run = RunDirectory.open(run_path)
    database = open_database(run)
    allowlist = Allowlist(database)
    polls, now = Polls(database, allowlist, "local"), time.time()
    polls.make("name", "Its name", "", now - 60, now + 3600, "mod")
    people = []
    for name in ("Asha", "Rafiq"):
        allowlist.sign_in(Person(name, "", "local", ()))
        people.append(allowlist.standing(name).number)
    kantha = polls.propose("name", "কাঁথা", people[0])
    polls.vote("name", kantha, people[1])
    polls.propose("name", "Shobdo", people[1])
    assert training_facts(run, 0).name_poll is None, "it is open still"
    polls.close("name", "mod")
    database.close()
    known = training_facts(run, 0)
    assert known.name_poll == NamePoll([("কাঁথা", 2), ("Shobdo", 1)], 2)
    spec = RunDirectory.open(run_path).spec
    card = card_of(spec, known)
    assert "named it **কাঁথা**; 2 members voted" in card
    assert ["Shobdo", "1"] in cells_of(card)
    assert "## Its name" not in card_of(spec, replace(known, name_poll=NamePoll([("x", 0)], 0)))


def test_the_same_losses_give_the_same_picture(tmp_path: Path) -> None:
    losses, heldout = facts().losses, facts().heldout
    draw_losses(losses, heldout, tmp_path / "one.png")
    draw_losses(losses, heldout, tmp_path / "two.png")
    draw_losses(losses[:-1], heldout, tmp_path / "other.png")
    draw_losses(losses, [], tmp_path / "not measured.png")
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()
    assert len({path.read_bytes() for path in tmp_path.glob("*.png")}) == 3


@pytest.mark.parametrize("wrapped", ["{}", '{{"model": "m", "scores": {}}}'])
def test_scores_are_read(tmp_path: Path, wrapped: str) -> None:
    file = tmp_path / "scores.json"
    items = (
        '[{"task": "NER", "seconds": 3, "metrics": {"f1": {"mean": 0.5, "std": 0.1, "n": 3}, "loss": 2, "x": null}}]'
    )
    file.write_text(wrapped.format(items))
    [score] = load_scores(file)
    assert score == Score(task="NER", metrics={"f1": Metric(mean=0.5, std=0.1, n=3), "loss": Metric(mean=2)})


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("{", "not JSON"),
        (b"\xff", "not JSON"),
        ("{}", "at the top"),
        ("3", "at the top"),
        ('[{"task": "NER"}]', "0.metrics"),
        ('[{"task": "NER", "metrics": {"f1": "good"}}]', "0.metrics.f1"),
        ('[{"task": "NER", "metrics": {"f1": NaN}}]', "0.metrics.f1.mean"),
        (None, "cannot be read"),
    ],
)
def test_what_are_no_scores_is_told(tmp_path: Path, content: str | bytes | None, complaint: str) -> None:
    file = tmp_path / "scores.json"
    if content is not None:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(PublishingError, match=complaint) as caught:
        load_scores(file)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)
