import json
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from kantha.errors import SpecError
from kantha.spec import (
    PRESETS,
    DataSpec,
    EvaluationSpec,
    FileSource,
    HuggingFaceSource,
    RunSpec,
    ShobdoSource,
    dump_spec,
    load_spec,
    models,
    parse_spec,
)

SMALLEST = """\
name: x
data:
  sources:
  - kind: shobdo
"""

ALL_SOURCES = RunSpec(
    name="all kinds of sources",
    data=DataSpec(
        sources=(
            ShobdoSource(kind="shobdo"),
            FileSource(kind="file", path="a.txt"),
            HuggingFaceSource(kind="huggingface", name="a/b", config="bn"),
        )
    ),
    evaluation=EvaluationSpec(sentences=("আমি ভাত ___।", "আকাশের রং ___।")),
)


def problems(text: str) -> list[str]:
    with pytest.raises(SpecError) as caught:
        parse_spec(text, "run.yaml")
    return caught.value.problems


# ---- YAML, there and back


@pytest.mark.parametrize("spec", [*PRESETS.values(), ALL_SOURCES], ids=lambda spec: spec.name)
def test_a_spec_survives_yaml(spec: RunSpec) -> None:
    assert parse_spec(dump_spec(spec), "run.yaml") == spec


@pytest.mark.parametrize(
    "text",
    ["two\nlines", " ends ", "a: b # c", "null", "yes", "1.5", "'", '"', "...", "- a", "*a", "কাঁথা 🪡", "a " * 180],
)
def test_any_text_survives_yaml(text: str) -> None:
    sources, line = (FileSource(kind="file", path=text),), text.replace("\n", " ")
    evaluation = EvaluationSpec(sentences=(f"{line[:100]} ___", "___।"))
    spec = RunSpec(name="x", goal=line, data=DataSpec(sources=sources), evaluation=evaluation)
    assert parse_spec(dump_spec(spec), "run.yaml") == spec


def test_a_run_for_no_service_survives_yaml() -> None:
    spec = parse_spec(SMALLEST + "services: {}\n", "run.yaml")
    assert parse_spec(dump_spec(spec), "run.yaml") == spec


def test_a_written_spec_can_be_loaded_from_its_file(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(dump_spec(PRESETS["demo"]), encoding="utf-8")
    assert load_spec(path) == PRESETS["demo"]


def test_every_field_has_a_description_that_stands_above_it() -> None:
    parts = [
        part
        for part in vars(models).values()
        if isinstance(part, type) and issubclass(part, BaseModel) and part.__doc__
    ]
    silent = [
        f"{part.__name__}.{name}"
        for part in parts
        for name, field in part.model_fields.items()
        if not field.description and name != "kind"  # the kind of a source speaks for itself
    ]
    assert silent == []
    lines = dump_spec(ALL_SOURCES).splitlines()
    for above, line in pairwise(lines):
        field = line.strip().removeprefix("- ").partition(":")[0]
        if line.lstrip().startswith("- ") and ":" not in line:  # one of several sentences
            continue
        if line and not line.lstrip().startswith("#") and field not in ("kind", "local", "kaggle", "colab", "hosted"):
            assert above.lstrip().startswith("# ") or "kind:" in above, line


# ---- the fingerprint


def changed(part: BaseModel) -> Iterator[tuple[str, Any]]:
    """The spec with one field changed, for every field, however deep."""
    for name in type(part).model_fields:
        value = getattr(part, name)
        if name == "kind":
            continue
        for path, other in changed_value(value):
            yield f"{name}{path}", part.model_copy(update={name: other})


def changed_value(value: Any) -> Iterator[tuple[str, Any]]:
    match value:
        case BaseModel():
            yield from ((f".{path}", other) for path, other in changed(value))
        case tuple():
            yield "[]", value[:-1]
            yield "[swapped]", value[::-1]
            for i, item in enumerate(value):
                others = changed_value(item)
                yield from ((f"[{i}]{path}", (*value[:i], other, *value[i + 1 :])) for path, other in others)
        case dict():
            for key, item in value.items():
                yield f"[no {key}]", {k: v for k, v in value.items() if k != key}
                yield from ((f"[{key}].{path}", {**value, key: other}) for path, other in changed(item))
        case str() | None:
            yield "", f"{value}x"
        case int():
            yield "", value + 1
        case float():
            yield "", value + 0.125


@pytest.mark.filterwarnings("ignore:Pydantic serializer warnings")
def test_every_field_counts_for_the_fingerprint() -> None:
    others = list(changed(ALL_SOURCES))
    paths = {path for path, _ in others}
    assert {"name", "tokenizer.sha256", "data.sources[2].revision", "services[local].max_instances"} <= paths
    fingerprints = {ALL_SOURCES.fingerprint, *(other.fingerprint for _, other in others)}
    assert len(fingerprints) == 1 + len(others)


def test_the_fingerprint_does_not_depend_on_how_the_yaml_is_written() -> None:
    plain = parse_spec(SMALLEST + "seed: 3\nservices: {local: {max_instances: 2}, colab: {}}\n", "a")
    other = """
    # a comment
    services: {"colab": {max_instances: 1}, 'local': {max_instances: 2}}
    seed:   0x3
    data: {sequence_length: 512, sources: [{weight: 1, kind: "shobdo"}]}
    'name': "x"   # another
    """
    assert parse_spec(other, "b").fingerprint == plain.fingerprint
    assert parse_spec(dump_spec(plain), "c").fingerprint == plain.fingerprint


def test_what_was_left_at_its_default_counts_too() -> None:
    """Or two versions with different defaults would read different specs under one fingerprint."""
    canonical = json.loads(parse_spec(SMALLEST, "run.yaml").canonical())
    assert canonical == RunSpec.model_validate(canonical).model_dump(mode="json")
    assert canonical["swarm"]["matchmaking_seconds"] == 10.0


def test_a_spec_sent_as_json_keeps_its_fingerprint() -> None:
    for spec in [*PRESETS.values(), ALL_SOURCES]:
        sent = json.loads(json.dumps(spec.model_dump(mode="json")))
        assert RunSpec.model_validate(sent).fingerprint == spec.fingerprint


# ---- mistakes: the line, the path, what is wrong


@pytest.mark.parametrize(
    ("addition", "place", "what"),
    [
        ("nmae: y\n", "line 5: nmae:", "no such field"),
        ("model:\n  layers: 2\n  hiden_size: 64\n", "line 7: model.hiden_size:", "no such field"),
        ("seed: many\n", "line 5: seed:", "valid integer"),
        ("seed: many\n", "line 5: seed:", "'many'"),
        ("model: 3\n", "line 5: model:", "found 3"),
        ("optimizer:\n\n  learning_rate: -1\n", "line 7: optimizer.learning_rate:", "greater than 0"),
        ("  - kind: file\n    path: a.txt\n    weight: heavy\n", "line 7: data.sources[1].weight:", "'heavy'"),
        ("  - kind: file\n    weight: 1\n", "line 5: data.sources[1].path:", "is missing"),
        ("  - kind: file\n    path: a.txt\n    shards: 3\n", "line 7: data.sources[1].shards:", "no such field"),
        ("  - kind: newspaper\n", "line 5: data.sources[1]:", "'shobdo', 'file', 'huggingface'"),
        ("  - weight: 2\n", "line 5: data.sources[1]:", "'kind'"),
        ("services:\n  moon: {max_instances: 1}\n", "line 6: services.moon", "'local', 'kaggle', 'colab' or 'hosted'"),
        ("model:\n  hidden_size: 100\n", "line 5: model:", "hidden_size 100 is not a multiple of attention_heads 12"),
        ("model:\n  layer_groups: 5\n", "line 5: model:", "layers 12 is no multiple of layer_groups 5"),
        ("schedule:\n  warmup_rounds: 9\n", "line 6: schedule.warmup_rounds:", "no such field"),
        ("optimizer:\n  name: sgd\n", "line 6: optimizer.name:", "'lamb' or 'adamw'"),
        ('goal: "two\\nlines"\n', "line 5: goal:", "one line without control characters, not with U+000A"),
        ('goal: "\\u202E"\n', "line 5: goal:", "U+202E"),
        ("model:\n  activation: gelo\n", "line 6: model.activation:", "'gelu', 'gelu_new'"),
        ("evaluation:\n  sentences:\n  - আমি ভাত খাই।\n", "line 7: evaluation.sentences[0]:", "must have one blank"),
        ("evaluation:\n  sentences:\n  - a ____\n", "line 7: evaluation.sentences[0]:", "written ___"),
        ('evaluation:\n  sentences: ["___\\n"]\n', "line 6: evaluation.sentences[0]:", "one line"),
        (f"evaluation:\n  sentences: [{', '.join(['___'] * 9)}]\n", "line 6: evaluation.sentences:", "at most 8"),
        ("schedule:\n  goal_samples: 0\n", "line 6: schedule.goal_samples:", "greater than or equal to 1"),
        ("services:\n  colab:\n    checked: soon\n", "line 7: services.colab.checked:", "date"),
        ("seed: 1\nseed: 2\n", "line 6: seed:", "stands in line 5 already"),
        ("model:\n  layers: 2\n  layers: 3\n", "line 7: layers:", "stands in line 6 already"),
        ("model: {layers: 2, layers: 3}\n", "line 5: layers:", "already"),
        ("language: Bengali\n", "line 5: language:", "'Bengali'"),
    ],
)
def test_a_mistake_is_told_with_its_place(addition: str, place: str, what: str) -> None:
    [problem] = problems(SMALLEST + addition)
    assert problem.startswith(place)
    assert what in problem
    assert "\n" not in problem


def test_a_mistake_in_the_only_source_is_one_mistake() -> None:
    [problem] = problems("name: x\ndata:\n  sources:\n  - kind: file\n")
    assert problem == "line 4: data.sources[0].path: is missing"


def test_a_missing_field_is_told_with_the_part_it_belongs_to() -> None:
    assert problems("name: x\n") == ["line 1: data: is missing"]
    assert problems("name: x\ndata:\n  sequence_length: 64\n") == ["line 2: data.sources: is missing"]


def test_a_sequence_longer_than_the_model_reads_is_refused() -> None:
    text = SMALLEST + "model:\n  max_positions: 64\n"
    [problem] = problems(text)
    assert "data.sequence_length 512 is longer than model.max_positions 64" in problem
    assert parse_spec(text.replace("sources", "sequence_length: 64\n  sources"), "run.yaml").data.sequence_length == 64


def test_every_mistake_has_a_line_that_names_the_file() -> None:
    with pytest.raises(SpecError) as caught:
        parse_spec(SMALLEST + "seed: many\nmodel:\n  layers: 0\n", "my.yaml")
    lines = str(caught.value).splitlines()
    assert len(lines) == 2
    assert all(line.startswith("my.yaml: line ") for line in lines)
    assert caught.value.exit_code == 10


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("name: x\n  data: [", "line 2, column 7: "),
        ("name: x\ndata: [1, 2\n", "line 3, column 1: "),
        ("name:\n\t- x", "line 2, column 1: "),
        ("name: *nobody", "line 1, column 7: "),
        ("name: x\n---\nname: y\n", "line 2, column 1: "),
        ("name: \0", ""),
    ],
)
def test_text_that_is_no_yaml_is_told_with_its_place(text: str, place: str) -> None:
    [problem] = problems(text)
    assert problem.startswith(f"{place}not valid YAML (")


@pytest.mark.parametrize("value", ["2024-02-30", "!!int three", "!!timestamp soon"])
def test_a_value_that_yaml_cannot_read_is_told(value: str) -> None:
    [problem] = problems(f"{SMALLEST}goal: {value}\n")
    assert "\n" not in problem


@pytest.mark.parametrize("value", [".inf", ".nan"])
def test_a_number_that_is_none_is_refused(value: str) -> None:
    """JSON has no such numbers, so that volunteers would get another spec than the coordinator's."""
    [problem] = problems(f"{SMALLEST}optimizer:\n  learning_rate: {value}\n")
    assert problem.startswith("line 6: optimizer.learning_rate:")


def test_nesting_without_end_is_told() -> None:
    [problem] = problems(f"name: {'[' * 5_000}{']' * 5_000}\n")
    assert problem.startswith("nested too deeply")


def test_aliases_do_no_harm() -> None:
    assert "name" in problems("name: &a [*a]\n")[0]
    bomb = "".join(f"x{i}: &x{i} [{', '.join([f'*x{i - 1}'] * 9)}]\n" for i in range(1, 30))
    assert len(problems(f"x0: &x0 [a]\n{bomb}")) > 30


@pytest.mark.parametrize("text", ["", "# only a comment\n", "- name: x\n", "hello"])
def test_a_file_without_fields_is_told_what_is_expected(text: str) -> None:
    [problem] = problems(text)
    assert "not a run spec" in problem
    assert "kantha init" in problem


def test_a_file_that_cannot_be_read_is_told_by_its_name(tmp_path: Path) -> None:
    latin = tmp_path / "latin.yaml"
    latin.write_bytes("name: Åse\n".encode("latin-1"))
    for path, part in [(latin, "UTF-8"), (tmp_path / "none.yaml", "no such file"), (tmp_path, "directory")]:
        with pytest.raises(SpecError) as caught:
            load_spec(path)
        assert str(caught.value).startswith(f"{path}: ")
        assert part in str(caught.value)
        assert len(str(caught.value).splitlines()) == 1
