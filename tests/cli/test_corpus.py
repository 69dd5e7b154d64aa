from pathlib import Path

from typer.testing import CliRunner

from kantha.cli.main import app
from kantha.coordinator.rundir import RunDirectory


def test_inspect_shows_examples_and_counts(tiny_run: RunDirectory) -> None:
    result = CliRunner().invoke(
        app, ["corpus", "inspect", str(tiny_run.path), "--examples", "3", "--documents", "50"], env={"COLUMNS": "100"}
    )
    assert result.exit_code == 0, result.output
    for part in ("1. ", "3. ", "⏎", "⟨", "held out", "tokens a word", "unknown", "padding"):
        assert part in result.output
    assert "4. " not in result.output


def test_inspect_wants_a_run(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["corpus", "inspect", str(tmp_path)])
    assert result.exit_code != 0
    assert "no run here" in str(result.exception)
