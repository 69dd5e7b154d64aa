import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models
from typer.testing import CliRunner

from kantha.cli.main import app
from kantha.coordinator.rundir import RunDirectory
from kantha.corpus import load_tokenizer
from kantha.spec import RunSpec, dump_spec

Kantha = Callable[..., tuple[int, str, str]]  # the fixture


@pytest.fixture
def spec_file(tiny_spec: RunSpec, tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(dump_spec(tiny_spec), encoding="utf-8")
    return path


def test_training_reports_beside_another_tokenizer_and_the_run_takes_it(
    kantha: Kantha, spec_file: Path, tiny_run: RunDirectory, tmp_path: Path
) -> None:
    out, other = tmp_path / "made.json", tmp_path / "other.json"
    Tokenizer(models.WordLevel({"<unk>": 0, "কাঁথা": 1}, "<unk>")).save(str(other))
    code, printed, error = kantha("tokenizer", "train", spec_file, out, "--compare", other)
    assert (code, error) == (0, "")
    assert out.read_bytes() == tiny_run.tokenizer.read_bytes()
    rows = {" ".join(line.split()[:-2]): line.split()[-2:] for line in printed.splitlines() if line.startswith("  ")}
    assert rows["pieces in the vocabulary"] == ["173", "2"]
    assert rows["bytes of the file"] == [f"{path.stat().st_size:,}" for path in (out, other)]
    assert float(rows["tokens a word (fertility)"][0]) > float(rows["tokens a word (fertility)"][1]) == 1.0
    assert rows["tokens that are unknown"][0] == "0.0000%"
    assert rows["words with an unknown token"][1] == "100.0000%"
    assert {"words that stay one piece", "characters a token"} <= rows.keys()
    assert f"most often unknown to {other}: U+09" in printed
    assert " BENGALI " in printed
    assert f"--tokenizer {out}" in printed

    code, printed, error = kantha("create", spec_file, tmp_path / "run", "--tokenizer", out)
    assert (code, error) == (0, "")
    assert "training the tokenizer" not in printed
    run = RunDirectory.open(tmp_path / "run")
    assert run.spec.tokenizer.sha256 == hashlib.sha256(out.read_bytes()).hexdigest()
    assert run.spec.fingerprint == tiny_run.spec.fingerprint
    assert load_tokenizer(run.tokenizer, run.spec.tokenizer.sha256).get_vocab_size() == 173


def test_nothing_is_overwritten(kantha: Kantha, spec_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "made.json"
    out.write_text("years of work")
    code, printed, error = kantha("tokenizer", "train", spec_file, out)
    assert (code, printed) == (16, "")
    assert error.startswith(f"kantha: {out}: exists already")
    assert out.read_text() == "years of work"


def test_a_place_or_a_comparison_that_is_none_is_told_before_training(
    kantha: Kantha, spec_file: Path, tmp_path: Path
) -> None:
    code, printed, error = kantha("tokenizer", "train", spec_file, tmp_path / "none" / "made.json")
    assert (code, printed) == (16, "")
    assert "no such folder" in error
    code, printed, error = kantha("tokenizer", "train", spec_file, tmp_path / "made.json", "--compare", spec_file)
    assert (code, printed) == (17, "")
    assert f"{spec_file}: is no tokenizer" in error
    assert len(error.splitlines()) == 1


def test_a_run_refuses_a_tokenizer_that_does_not_fit(
    kantha: Kantha, spec_file: Path, tiny_run: RunDirectory, tmp_path: Path
) -> None:
    content = json.loads(tiny_run.tokenizer.read_text(encoding="utf-8"))
    content["normalizer"] = None
    other = tmp_path / "other.json"
    other.write_text(json.dumps(content), encoding="utf-8")
    for file, problem in ((other, "normalizer"), (tmp_path / "none.json", "No such file")):
        code, _, error = kantha("create", spec_file, tmp_path / "run", "--tokenizer", file)
        assert code == 17
        assert error.startswith(f"kantha: {file}: ")
        assert problem in error
        assert len(error.splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_without_a_heldout_document_the_tokenizer_is_kept(kantha: Kantha, tiny_spec: RunSpec, tmp_path: Path) -> None:
    data = tiny_spec.data.model_copy(update={"heldout_share": 1e-9})
    (tmp_path / "run.yaml").write_text(dump_spec(tiny_spec.model_copy(update={"data": data})), encoding="utf-8")
    code, _, error = kantha("tokenizer", "train", tmp_path / "run.yaml", tmp_path / "made.json")
    assert code == 13
    assert "data.heldout_share" in error
    assert (tmp_path / "made.json").exists()


def test_help_teaches() -> None:
    result = CliRunner().invoke(app, ["tokenizer", "train", "--help"], env={"COLUMNS": "100"})
    assert result.exit_code == 0
    for part in ("--compare", "held-out", "kantha create SPEC RUN_DIR --tokenizer OUT"):
        assert part in " ".join(result.output.split())
