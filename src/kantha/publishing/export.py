"""A checkpoint as a model folder in Hugging Face's format, which plain `transformers` loads."""

import shutil
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from kantha import __version__
from kantha.corpus import SPECIAL_TOKENS, load_tokenizer
from kantha.digests import check_file
from kantha.errors import RunDirectoryError, StorageError
from kantha.evaluation import quiet_transformers
from kantha.spec import RunSpec, load_spec
from kantha.training import Replica
from kantha.training.checkpoint import MANIFEST, SPEC_FILE, TOKENIZER_FILE, list_checkpoints, read_manifest

_CARD = """\
---
language: {language}
library_name: transformers
pipeline_tag: fill-mask
tags: [albert, kantha]
---
# {name}

{goal}

Trained by volunteers with [Kantha](https://pypi.org/project/kantha/) {version}: {round} rounds of about
{batch} examples.

```python
from transformers import pipeline
fill = pipeline("fill-mask", "PATH-OF-THIS-FOLDER")
```

Run fingerprint `{fingerprint}`.
"""


def export_model(source: Path, out: Path) -> int:
    """Write the model of a run (its newest checkpoint), or of one checkpoint folder, to `out`; returns its round.

    Raises `RunDirectoryError` where `source` is neither, `DigestError` where a file of it is damaged, `StorageError`
    where `out` cannot be written. `out` appears only when it is whole.
    """
    checkpoint = source if (source / MANIFEST).is_file() else next(iter(list_checkpoints(source / "checkpoints")), None)
    if checkpoint is None:
        raise RunDirectoryError(f"{source}: neither a run nor a checkpoint; give the folder that `kantha serve` serves")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
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
    load_tokenizer(checkpoint / TOKENIZER_FILE, spec.tokenizer.sha256)
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
        (partial / "README.md").write_text(_card(spec, replica.round), encoding="utf-8")
        if out.exists():
            out.rmdir()
        partial.rename(out)
    except Exception as error:  # noqa: BLE001  safetensors and tokenizers have their own, even for a full disk
        raise StorageError(f"{out}: the model could not be written ({error}); make room, or choose another") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return replica.round


def _card(spec: RunSpec, round_number: int) -> str:
    return _CARD.format(
        language=spec.language,
        name=spec.name,
        goal=spec.goal,
        version=__version__,
        round=round_number,
        batch=spec.swarm.target_batch_size,
        fingerprint=spec.fingerprint,
    )
