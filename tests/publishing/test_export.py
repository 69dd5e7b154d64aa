import contextlib
import socket
from pathlib import Path

import pytest
import torch
import transformers
from tokenizers import Tokenizer
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from kantha.coordinator.rundir import RunDirectory
from kantha.corpus import Batch
from kantha.errors import DigestError, KanthaError, RunDirectoryError, StorageError
from kantha.publishing import export_model
from kantha.training import Replica
from kantha.training.checkpoint import list_checkpoints

SENTENCE = "রহিম আজ সকালে লাল কাঁথা খুঁজে পেল।"


@pytest.fixture(scope="module")
def trained(tiny_run: RunDirectory) -> Replica:
    """The state of round 6 of the run: its first weights, changed by chance."""
    chance = torch.Generator().manual_seed(6)
    replica = Replica(tiny_run.spec)
    with torch.no_grad():
        for parameter in replica.parameters:
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=chance))
    return replica


@pytest.fixture
def run(run_path: Path, trained: Replica) -> RunDirectory:
    run = RunDirectory.open(run_path)
    run.save_checkpoint(trained, 6)
    return run


@pytest.fixture
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a local model needs no network")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.mark.usefixtures("_no_network")
def test_plain_transformers_fills_in_a_mask(run: RunDirectory, tmp_path: Path) -> None:
    assert export_model(run.path, tmp_path / "model") == 6
    fill = transformers.pipeline("fill-mask", model=str(tmp_path / "model"), top_k=3)
    assert type(fill.model).__module__.startswith("transformers.")
    assert type(fill.tokenizer).__module__.startswith("transformers.")
    guesses = fill(SENTENCE.replace("কাঁথা", fill.tokenizer.mask_token))
    assert len(guesses) == 3
    scores = [guess["score"] for guess in guesses]
    assert scores == sorted(scores, reverse=True)
    assert guesses[0]["sequence"].startswith("রহিম আজ সকালে")


@pytest.mark.usefixtures("_no_network")
def test_the_exported_model_is_the_one_that_was_trained(
    run: RunDirectory, tmp_path: Path, trained: Replica, tiny_tokenizer: Tokenizer, tiny_batches: list[Batch]
) -> None:
    export_model(run.path, tmp_path / "model")
    model = transformers.AutoModelForPreTraining.from_pretrained(tmp_path / "model").eval()
    batch = tiny_batches[0]
    inputs = (batch.input_ids, batch.attention_mask, batch.token_type_ids)
    with torch.no_grad():
        mine, theirs = trained.model.eval()(*inputs), model(*inputs)
    torch.testing.assert_close(theirs.prediction_logits, mine.prediction_logits)
    torch.testing.assert_close(theirs.sop_logits, mine.sop_logits)

    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    first, second = SENTENCE, "  আমার ভাই\nমেলার শেষে  "
    encoded, expected = tokenizer(first, second), tiny_tokenizer.encode(first, second)
    assert encoded["input_ids"] == expected.ids
    assert encoded["token_type_ids"] == expected.type_ids
    assert tokenizer.mask_token_id == tiny_tokenizer.token_to_id("[MASK]")
    assert tokenizer.model_max_length == 32


def test_the_folder_says_what_it_is(run: RunDirectory, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()  # an empty folder may be there
    export_model(run.path, tmp_path / "model")
    card = (tmp_path / "model" / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---\nlanguage: bn\n")
    for part in ("# tiny", "A model for tests.", "6 rounds", run.spec.fingerprint):
        assert part in card
    assert str(tmp_path) not in card
    assert {path.name for path in tmp_path.iterdir()} == {"run", "model"}


def test_one_checkpoint_is_enough(run: RunDirectory, tmp_path: Path) -> None:
    newest, oldest = list_checkpoints(run.checkpoints)
    alone = newest.rename(tmp_path / "alone")
    assert export_model(alone, tmp_path / "from-checkpoint") == 6
    assert export_model(oldest, tmp_path / "from-older") == 0
    assert export_model(run.path, tmp_path / "from-run") == 0
    for name in ("model.safetensors", "tokenizer.json", "config.json"):
        older, newer = ((tmp_path / part / name).read_bytes() for part in ("from-older", "from-run"))
        assert older == newer


def test_what_is_there_already_is_not_overwritten(run: RunDirectory, tmp_path: Path) -> None:
    folder, file = tmp_path / "folder", tmp_path / "file"
    folder.mkdir()
    (folder / "thesis.txt").write_text("years of work")
    file.write_text("years of work")
    for out in (folder, file):
        with pytest.raises(StorageError, match="choose another folder") as caught:
            export_model(run.path, out)
        assert caught.value.exit_code == 16
    assert [path.name for path in folder.iterdir()] == ["thesis.txt"]
    assert file.read_text() == "years of work"


def test_where_neither_run_nor_checkpoint_is_it_is_told(tmp_path: Path) -> None:
    for source in (tmp_path, tmp_path / "none"):
        with pytest.raises(RunDirectoryError, match="neither a run nor a checkpoint") as caught:
            export_model(source, tmp_path / "model")
        assert caught.value.exit_code == 11
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "tokenizer.json", "run.yaml"])
@pytest.mark.parametrize("damage", ["cut", "missing"])
def test_a_damaged_checkpoint_gives_no_model(run: RunDirectory, tmp_path: Path, name: str, damage: str) -> None:
    file = list_checkpoints(run.checkpoints)[0] / name
    if damage == "cut":
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    else:
        file.unlink()
    with pytest.raises(DigestError) as caught:
        export_model(run.path, tmp_path / "model")
    assert str(file) in str(caught.value)
    assert {path.name for path in tmp_path.iterdir()} == {"run"}


def test_a_model_is_written_to_the_current_folder_or_refused(
    run: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with contextlib.suppress(KanthaError):  # refusing is all right, if it is said
        export_model(run.path, Path())
        assert (tmp_path / "here" / "model.safetensors").is_file()


@pytest.mark.parametrize("part", [PreTrainedModel, PreTrainedTokenizerFast])
def test_whatever_fails_while_writing_is_told_and_leaves_nothing(
    run: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: type
) -> None:
    """The libraries have errors of their own, where they have any; that of `tokenizers` is a bare `Exception`."""

    def full(*_: object, **__: object) -> None:
        raise Exception("No space left on device")

    monkeypatch.setattr(part, "save_pretrained", full)
    with pytest.raises(StorageError, match="No space left on device"):
        export_model(run.path, tmp_path / "model")
    assert {path.name for path in tmp_path.iterdir()} == {"run"}


def test_a_place_that_cannot_be_written_is_told(run: RunDirectory, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError) as caught:
        export_model(run.path, tmp_path / "file" / "model")
    assert str(tmp_path / "file" / "model") in str(caught.value)
