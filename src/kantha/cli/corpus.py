"""`kantha corpus inspect`: what the pipeline makes of a run's text. Bugs in data are found by looking."""

from pathlib import Path

from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from tokenizers import Tokenizer

from kantha.coordinator.rundir import RunDirectory
from kantha.corpus import MASK_ID, Batch, ExampleStream, load_tokenizer

_BATCH = 32


def inspect_corpus(run_dir: Path, examples: int, documents: int, seed: int, console: Console) -> None:
    """Show finished examples of a run, and count what became of its text.

    :param documents: how many are read, at least
    :param seed: of the peer whose walk through the data is shown
    Raises `RunDirectoryError`, `CorpusError`, `MissingPackageError`.
    """
    run = RunDirectory.open(run_dir)
    tokenizer = load_tokenizer(run.tokenizer, run.spec.tokenizer.sha256)
    stream = ExampleStream(run.spec, tokenizer, seed)
    made = tokens = places = masked = 0
    shown: list[Batch] = []
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("reading", total=documents)
        while stream.counts.documents < documents or made < examples:
            batch = stream.next_batch(_BATCH)
            if made < examples:
                shown.append(batch)
            made += batch.size
            tokens += int(batch.attention_mask.sum())
            places += batch.input_ids.numel()
            masked += len(batch.masked_labels)
            progress.update(bar, completed=min(documents, stream.counts.documents))
    console.print("Finished examples. ⟨to guess⟩ ⟨to guess→what stands there instead⟩ ⏎ between the segments\n")
    rows = [(batch, row) for batch in shown for row in range(batch.size)][:examples]
    for number, (batch, row) in enumerate(rows, 1):
        order = "B before A in the text" if batch.swapped[row] else "A before B"
        console.print(f"{number}. {order}", markup=False)
        console.print(f"   {decode(batch, row, tokenizer)}\n", markup=False, soft_wrap=True)
    counts = stream.counts
    table = Table(box=None, show_header=False, padding=(0, 2))
    table.add_column(justify="right")
    table.add_column()
    table.add_row(f"{counts.documents:,}", "documents read")
    table.add_row(f"{counts.heldout / counts.documents:.1%}", "of them held out for measuring")
    for reason, count in counts.dropped.most_common():
        table.add_row(f"{count / counts.documents:.1%}", f"of them dropped: {reason}")
    table.add_row(f"{counts.sentences:,}", "sentences that train")
    table.add_row(f"{counts.words:,}", "words")
    table.add_row(f"{counts.tokens:,}", "tokens")
    table.add_row(f"{counts.tokens / max(1, counts.words):.2f}", "tokens a word (fertility)")
    table.add_row(f"{counts.unknown / max(1, counts.tokens):.3%}", "of the tokens unknown")
    table.add_row(f"{counts.short / max(1, counts.tokens):.1%}", "of the tokens lost: rests too short for an example")
    table.add_row(f"{tokens / made:.1f}", f"tokens an example, of {run.spec.data.sequence_length} at most")
    table.add_row(f"{1 - tokens / places:.1%}", f"padding, in batches of {_BATCH}")
    table.add_row(f"{masked / tokens:.1%}", f"of the tokens to guess (masking: {run.spec.objective.masking})")
    console.print(table)


def decode(batch: Batch, row: int, tokenizer: Tokenizer) -> str:
    """One example as text, with what is masked in angle brackets."""
    width = batch.input_ids.shape[1]
    labels = {
        int(position) % width: int(label)
        for position, label in zip(batch.masked_positions, batch.masked_labels, strict=True)
        if int(position) // width == row
    }
    parts = []
    length = int(batch.attention_mask[row].sum())
    for place, token in enumerate(batch.input_ids[row, :length].tolist()):
        piece = str(tokenizer.id_to_token(token)).replace("▁", " ")
        if place in labels:
            label = str(tokenizer.id_to_token(labels[place])).replace("▁", " ")
            instead = "" if token in (MASK_ID, labels[place]) else f"→{piece}"
            parts.append(f"⟨{label}{instead}⟩")
        elif place not in (0, length - 1):  # [CLS] and the last [SEP] say nothing
            parts.append(" ⏎" if piece == "[SEP]" else piece)
    return "".join(parts).strip()
