"""`kantha publish`, to a hub on loopback."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import transformers
from canaries import TOKEN
from hub import Hub, serving
from huggingface_hub import constants

from kantha.coordinator.ledger import Ledger
from kantha.coordinator.rundir import RunDirectory
from kantha.swarm.membership import Membership
from kantha.swarm.reports import RoundReport
from kantha.training import Replica

NAME = "asha/tiny"
Publish = Callable[..., tuple[int, str, str]]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """The hub that the library knows, and Asha's token for it in the environment."""
    for name in ("HUGGING_FACE_HUB_TOKEN", "HF_OIDC_RESOURCE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(constants, "HF_STORED_TOKENS_PATH", str(tmp_path / "stored_tokens"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    with serving(TOKEN, "asha") as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        yield hub


@pytest.fixture
def run(run_path: Path) -> Path:
    """A run of two rounds."""
    run = RunDirectory.open(run_path)
    run.save_checkpoint(Replica(run.spec), 2)
    ledger = Ledger(run.ledger)
    ledger.add_member(
        Membership(
            serial="0" * 16,
            run=run.spec.fingerprint,
            username="Asha",
            peer_id="a",
            service="local",
            roles=("trainer",),
            issued=0,
            expires=100,
        )
    )
    ledger.add_rounds(
        "a",
        [
            RoundReport(
                round=number,
                lineage=f"after {number}",
                samples=64,
                seconds=1.0,
                waited=0.0,
                mlm_loss_sum=300.0,
                sop_loss_sum=40.0,
                peers=1,
            )
            for number in (1, 2)
        ],
    )
    ledger.close()
    return run_path


@pytest.fixture
def publish(kantha: Publish, run: Path) -> Publish:
    """Runs `kantha publish` on the run; returns exit code, stdout, stderr. The token is in neither."""

    def call(*arguments: object) -> tuple[int, str, str]:
        code, out, error = kantha("publish", run, *arguments)
        assert TOKEN not in out + error
        return code, out, error

    return call


def last_line(error: str, *parts: str) -> None:
    """What is said of the failure; before it may stand what the library said while it tried again."""
    line = error.splitlines()[-1]
    assert line.startswith("kantha: ")
    for part in parts:
        assert part in line
    assert error.count("kantha: ") == 1


def files_in(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_published_folder_is_private_and_fills_in_masks(
    publish: Publish, hub: Hub, run: Path, tmp_path: Path
) -> None:
    scores = tmp_path / "scores.json"
    scores.write_text('[{"task": "NER", "metrics": {"f1": 0.5}}]')
    code, out, _ = publish(NAME, "--scores", scores)
    assert code == 0
    assert hub.repositories[NAME].visibility == "private"
    assert hub.repositories[NAME].files == files_in(run / "published")
    for part in (
        f"{hub.url}/{NAME}",
        str(run / "published"),
        f"kantha publish {run} {NAME} --public --scores {scores}",
    ):
        assert part in out.replace("\n", "")
    card = hub.repositories[NAME].files["README.md"].decode()
    for part in ("# tiny", "sentences.txt", "| NER |", "`Asha`", f'"{NAME}"'):
        assert part in card

    fetched = tmp_path / "fetched"
    fetched.mkdir()
    for name, content in hub.repositories[NAME].files.items():
        (fetched / name).write_bytes(content)
    fill = transformers.pipeline("fill-mask", str(fetched))
    assert type(fill.model).__module__.startswith("transformers.")
    assert fill("আমার ভাই [MASK] সকালে বই নিয়ে এল।")[0]["token_str"]


def test_publishing_again_sends_nothing_again(publish: Publish, hub: Hub) -> None:
    assert publish(NAME)[0] == 0
    hub.arrived.clear()
    assert publish(NAME)[0] == 0
    assert hub.arrived == []
    assert hub.repositories[NAME].commits == ["The model after round 2"]


def test_an_upload_that_broke_off_goes_on(
    publish: Publish, hub: Hub, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pause = time.sleep
    monkeypatch.setattr(time, "sleep", lambda seconds: pause(min(seconds, 0.01)))  # the library is patient
    assert publish(NAME)[0] == 0  # to know the sizes
    sizes = sorted(len(hub.repositories[NAME].files[name]) for name in ("model.safetensors", "training.png"))
    hub.repositories.clear()
    hub.objects.clear()
    hub.arrived.clear()

    hub.break_after = sizes[0]  # the larger of the two breaks off in its middle, as often as it is tried
    code, _, error = publish(NAME)
    assert code == 28
    last_line(error, NAME, "broke off", "the same command again")
    assert hub.broken > 1
    assert [size for _, size in hub.arrived] == [sizes[0]]
    assert hub.repositories[NAME].files == {}  # no half of a model is shown

    hub.break_after = None
    hub.arrived.clear()
    assert publish(NAME)[0] == 0
    assert [size for name, size in hub.arrived if name.startswith("/storage/")] == [sizes[1]]
    assert hub.repositories[NAME].files == files_in(run / "published")


def test_it_is_public_only_when_asked_for(publish: Publish, hub: Hub) -> None:
    code, out, _ = publish(NAME)
    assert code == 0
    code, out, _ = publish(NAME, "--public")
    assert code == 0
    assert "(public)" in out
    assert hub.repositories[NAME].visibility == "public"
    code, _, error = publish(NAME)
    assert code == 28
    last_line(error, "is public already", "--public")
    assert publish(NAME, "--public")[0] == 0
    assert publish("asha/other", "--public")[0] == 0
    assert hub.repositories["asha/other"].visibility == "public"


def test_a_public_model_is_private_until_it_is_whole(
    publish: Publish, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    pause = time.sleep
    monkeypatch.setattr(time, "sleep", lambda seconds: pause(min(seconds, 0.01)))
    hub.break_after = 100
    assert publish(NAME, "--public")[0] == 28
    assert hub.repositories[NAME].visibility == "private"


def test_without_a_token_it_is_told_how_to_get_one(
    publish: Publish, hub: Hub, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    code, _, error = publish(NAME)
    assert code == 28
    last_line(error, "hf auth login", "HF_TOKEN")
    assert hub.repositories == {}
    assert not (run / "published").exists()


def test_a_stored_token_will_do(publish: Publish, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    (tmp_path / "token").write_text(TOKEN)
    assert publish(NAME)[0] == 0
    assert NAME in hub.repositories


@pytest.mark.parametrize(("token", "name", "status"), [("hf_wrong", NAME, "401"), (TOKEN, "rafiq/tiny", "403")])
def test_a_token_that_may_not_write_there_is_told(
    publish: Publish, hub: Hub, monkeypatch: pytest.MonkeyPatch, token: str, name: str, status: str
) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    code, out, error = publish(name)
    assert code == 28
    last_line(error, name, status, "HF_TOKEN")
    assert token not in out + error
    assert hub.arrived == []


@pytest.mark.parametrize("name", ["tiny", "asha/tiny/more", "asha/ti ny", "asha/..", ""])
def test_a_name_that_is_none_is_told(publish: Publish, hub: Hub, name: str) -> None:
    code, _, error = publish(name)
    assert code == 28
    last_line(error, "OWNER/NAME")
    assert hub.repositories == {}


def test_a_hub_that_does_not_answer_is_told(
    publish: Publish, hub: Hub, run: Path, free_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{free_port}")
    code, _, error = publish(NAME)
    assert code == 28
    last_line(error, NAME, "refused", "the same command again")
    assert (run / "published" / "model.safetensors").is_file()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    code, _, error = publish(NAME)
    assert code == 28
    last_line(error, "HF_HUB_OFFLINE")


def test_a_bare_checkpoint_is_published_and_told_apart(kantha: Publish, run: Path, hub: Hub, tmp_path: Path) -> None:
    checkpoint = next((run / "checkpoints").glob("round-*2"))
    code, out, _ = kantha("publish", checkpoint, NAME, "--out", tmp_path / "model")
    assert code == 0
    assert "names no contributors" in out
    assert hub.repositories[NAME].files == files_in(tmp_path / "model")


def test_only_a_model_of_this_run_is_replaced(publish: Publish, hub: Hub, tmp_path: Path) -> None:
    mine, other = tmp_path / "mine", tmp_path / "other"
    assert publish(NAME, "--out", mine)[0] == 0
    assert publish(NAME, "--out", mine)[0] == 0
    (mine / "thesis.txt").write_text("years of work")
    code, _, error = publish(NAME, "--out", mine)
    assert code == 16
    last_line(error, str(mine / "thesis.txt"))
    other.mkdir()
    (other / "README.md").write_text("# Another model")
    code, _, error = publish(NAME, "--out", other)
    assert code == 16
    last_line(error, str(other), "--out")
    assert files_in(other) == {"README.md": b"# Another model"}
    assert (mine / "model.safetensors").is_file()
    assert hub.repositories[NAME].files.keys() == files_in(mine).keys() - {"thesis.txt"}
