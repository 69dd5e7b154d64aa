"""A checkpoint as a model folder in Hugging Face's format, which plain `transformers` loads."""

import shutil
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from kantha.corpus import SPECIAL_TOKENS, heldout_sentences, load_tokenizer
from kantha.digests import check_file
from kantha.errors import CorpusError, MissingPackageError, RunDirectoryError, StorageError
from kantha.evaluation import FilledMask, fill_masks, quiet_transformers
from kantha.publishing.card import Model, TrainingFacts, write_card
from kantha.publishing.picture import draw_losses
from kantha.publishing.scores import Score
from kantha.spec import RunSpec, load_spec
from kantha.training import Replica
from kantha.training.checkpoint import MANIFEST, SPEC_FILE, TOKENIZER_FILE, list_checkpoints, read_manifest

_CARD_FILE = "README.md"
_PICTURE_FILE = "training.png"
_EXAMPLES = 8  # sentences with a word masked, in the card


def find_checkpoint(source: Path) -> Path:
    """The newest checkpoint of a run, or `source` where it is a checkpoint's folder. Raises `RunDirectoryError`."""
    checkpoint = source if (source / MANIFEST).is_file() else next(iter(list_checkpoints(source / "checkpoints")), None)
    if checkpoint is None:
        raise RunDirectoryError(f"{source}: neither a run nor a checkpoint; give the folder that `kantha serve` serves")
    return checkpoint


def export_model(
    source: Path,
    out: Path,
    facts: TrainingFacts | None = None,
    scores: Sequence[Score] = (),
    repository: str | None = None,
    replace: bool = False,
) -> int:
    """Write the model of a run (its newest checkpoint), or of one checkpoint folder, to `out`; returns its round.

    `out` appears only when it is whole. It may be there already where it is empty, or with `replace` where it is what
    this function wrote of the same run.

    :param facts: what the card says of the training
    :param scores: measured numbers for the card
    :param repository: name of the model on the hub, for the card's example

    Raises `RunDirectoryError` where `source` is neither, `DigestError` where a file of it is damaged, `StorageError`
    where `out` cannot be written.
    """
    checkpoint = find_checkpoint(source)
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not replace)):
        raise StorageError(f"{out}: exists already and is not empty; choose another folder for the model")
    out = out.resolve()
    if out == Path.cwd():
        raise StorageError(f"{out}: is the folder you are in, which cannot be replaced; choose another for the model")
    files = read_manifest(checkpoint).files
    if SPEC_FILE not in files or TOKENIZER_FILE not in files:
        raise RunDirectoryError(f"{checkpoint}: has no run spec or no tokenizer with it; choose another checkpoint")
    check_file(checkpoint / SPEC_FILE, files[SPEC_FILE])
    spec = load_spec(checkpoint / SPEC_FILE)
    replica = Replica(spec)
    replica.load(checkpoint)
    pieces = load_tokenizer(checkpoint / TOKENIZER_FILE, spec.tokenizer.sha256)
    pad, unknown, cls, sep, mask = SPECIAL_TOKENS
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(checkpoint / TOKENIZER_FILE),
        pad_token=pad,
        unk_token=unknown,
        cls_token=cls,
        sep_token=sep,
        mask_token=mask,
        model_max_length=spec.model.max_positions,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )
    partial = out.with_name(f".partial-{out.name}")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        with quiet_transformers():
            replica.model.save_pretrained(partial)
            tokenizer.save_pretrained(partial)
        if facts and len(facts.losses) > 1:
            draw_losses(facts.losses, facts.heldout, partial / _PICTURE_FILE)
        card = write_card(
            Model(
                spec,
                replica.round,
                sum(parameter.numel() for parameter in replica.parameters),
                replica.schedule_state,
                _fill_heldout(spec, pieces, partial),
                repository,
            ),
            facts,
            scores,
            _PICTURE_FILE if (partial / _PICTURE_FILE).exists() else None,
        )
        (partial / _CARD_FILE).write_text(card, encoding="utf-8")
        if out.exists():
            _clear(out, partial, spec)
        partial.rename(out)
    except StorageError:
        raise
    except Exception as error:  # noqa: BLE001  safetensors and tokenizers have their own, even for a full disk
        raise StorageError(f"{out}: the model could not be written ({error}); make room, or choose another") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return replica.round


def _fill_heldout(spec: RunSpec, pieces: Tokenizer, model_folder: Path) -> list[FilledMask]:
    """What the model fills in; nothing where the text is not at hand, which a model does not need."""
    try:
        sentences = heldout_sentences(spec, _EXAMPLES)
    except (CorpusError, MissingPackageError):
        return []
    fitting = [text for text in sentences if len(pieces.encode(text).ids) <= spec.model.max_positions]
    return fill_masks(model_folder, fitting)


def _clear(out: Path, successor: Path, spec: RunSpec) -> None:
    """Delete a model folder that is to be replaced. Raises `StorageError` where it is not what was exported before."""
    if any(out.iterdir()):
        card = out / _CARD_FILE
        if not card.is_file() or spec.fingerprint not in card.read_text(encoding="utf-8", errors="replace"):
            raise StorageError(f"{out}: is not empty, and holds no model of this run; choose another folder with --out")
        known = {path.name for path in successor.iterdir()} | {_PICTURE_FILE}
        if strange := sorted(path.name for path in out.iterdir() if path.name not in known):
            raise StorageError(
                f"{out / strange[0]}: does not belong to the model, and would be deleted; move it, or choose another "
                "folder with --out"
            )
    shutil.rmtree(out)
