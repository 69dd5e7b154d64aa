"""Text for training: sources → normalised documents → sentences → token ids → training examples."""

from kantha.corpus.examples import Batch, ExampleStream, heldout_batches, heldout_documents, heldout_sentences
from kantha.corpus.feed import Feed
from kantha.corpus.normalize import normalize, split_sentences
from kantha.corpus.sources import is_heldout, read_documents
from kantha.corpus.tokenizer import (
    CLS_ID,
    MASK_ID,
    PAD_ID,
    SEP_ID,
    SPECIAL_TOKENS,
    UNK_ID,
    check_tokenizer,
    load_tokenizer,
    read_tokenizer,
    save_tokenizer,
    train_tokenizer,
)

__all__ = [
    "CLS_ID",
    "MASK_ID",
    "PAD_ID",
    "SEP_ID",
    "SPECIAL_TOKENS",
    "UNK_ID",
    "Batch",
    "ExampleStream",
    "Feed",
    "check_tokenizer",
    "heldout_batches",
    "heldout_documents",
    "heldout_sentences",
    "is_heldout",
    "load_tokenizer",
    "normalize",
    "read_documents",
    "read_tokenizer",
    "save_tokenizer",
    "split_sentences",
    "train_tokenizer",
]
