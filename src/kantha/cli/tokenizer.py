"""`kantha tokenizer train`: a run's tokenizer, and how well it fits text that it has not seen."""

import unicodedata
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from kantha.corpus import heldout_documents, read_tokenizer, save_tokenizer, train_tokenizer
from kantha.corpus.fertility import Fertility, measure
from kantha.corpus.sources import mix
from kantha.errors import CorpusError, StorageError
from kantha.spec import RunSpec, load_spec

_DOCUMENTS = 1_000  # held-out ones, at most; of a streamed source a hundred times as many may have to be read
_UNKNOWN_SHOWN = 5


def train_and_measure(spec_file: Path, out: Path, others: Sequence[Path], console: Console) -> None:
    """Train the tokenizer of a run spec, write it to `out`, and print what it makes of held-out documents.

    :param others: tokenizer files to be measured on the same documents
    Raises `SpecError`, `CorpusError`, `MissingPackageError`, `TokenizerError`, `StorageError`.
    """

    def say(line: str) -> None:
        console.print(line, markup=False, soft_wrap=True)

    spec = load_spec(spec_file)
    if out.exists():
        raise StorageError(f"{out}: exists already; choose another name, or delete it first")
    if not out.parent.is_dir():
        raise StorageError(f"{out.parent}: no such folder; make it, or choose another place for the tokenizer")
    tokenizers = {path: read_tokenizer(path) for path in others}
    say(f"training the tokenizer on up to {spec.tokenizer.training_documents:,} documents …")
    trained = train_tokenizer(spec, say)
    save_tokenizer(trained, out)
    documents = _heldout(spec, console)
    measured = {path: measure(tokenizer, documents) for path, tokenizer in {out: trained, **tokenizers}.items()}
    say(f"\nMeasured on {len(documents):,} held-out documents:")
    console.print(_table(measured))
    for path, fertility in measured.items():
        if fertility.unknown:
            found = [
                f"U+{ord(character):04X} {unicodedata.name(character, 'without a name')} ({count:,})"
                for character, count in fertility.unknown.most_common(_UNKNOWN_SHOWN)
            ]
            say(f"most often unknown to {path}: {', '.join(found)}")
    say(f"wrote {out}. Next: `kantha create {spec_file} RUN_DIR --tokenizer {out}`.")


def _heldout(spec: RunSpec, console: Console) -> list[str]:
    sources = spec.data.sources
    parts = [heldout_documents(spec, source) for source in sources]
    documents = []
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("reading held-out documents", total=_DOCUMENTS)
        for document in islice(mix(parts, [source.weight for source in sources], spec.seed), _DOCUMENTS):
            documents.append(document)
            progress.advance(bar)
    if not documents:
        raise CorpusError(
            "no document is held out to measure on; add text to `data.sources` or raise `data.heldout_share` in the "
            "run spec"
        )
    return documents


def _table(measured: dict[Path, Fertility]) -> Table:
    table = Table(box=None, padding=(0, 2))
    table.add_column(no_wrap=True)
    for path in measured:
        table.add_column(str(path), justify="right", overflow="fold")
    results = measured.values()
    table.add_row("pieces in the vocabulary", *(f"{result.pieces:,}" for result in results))
    table.add_row("bytes of the file", *(f"{path.stat().st_size:,}" for path in measured))
    table.add_row("tokens a word (fertility)", *(f"{result.fertility:.3f}" for result in results))
    table.add_row("words that stay one piece", *(f"{result.whole:.1%}" for result in results))
    table.add_row("characters a token", *(f"{result.characters:.2f}" for result in results))
    table.add_row("tokens that are unknown", *(f"{result.unknown_tokens:.4%}" for result in results))
    table.add_row("words with an unknown token", *(f"{result.unknown_words:.4%}" for result in results))
    table.add_row(
        "characters without a piece", *(f"{len(result.unknown):,} of {result.alphabet:,}" for result in results)
    )
    return table
