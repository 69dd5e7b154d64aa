"""A small Bengali corpus, written for these tests: sentences put together from parts, so that there are enough."""

import json
import random
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from kantha.corpus import train_tokenizer
from kantha.spec import DataSpec, FileSource, ModelSpec, RunSpec, TokenizerSpec

WHO = ["আমার ভাই", "ছোট মেয়েটি", "পাশের বাড়ির কাকা", "রহিম", "গ্রামের জেলে", "নতুন শিক্ষক", "সীমা", "বুড়ো মাঝি"]
WHEN = ["আজ সকালে", "গতকাল বিকেলে", "প্রতিদিন", "বর্ষার রাতে", "শীতের দিনে", "১৯৮৫ সালে", "মেলার শেষে"]
WHAT = ["নদীর ঘাটে বসে", "পুরোনো বইটি", "লাল কাঁথা", "ইলিশ মাছ", "বাজার থেকে চাল", "স্কুলের মাঠে", "মাটির হাঁড়ি"]
DID = ["খুঁজে পেল।", "দেখে হাসল!", "কিনে আনল।", "কি ভুলে গেল?", "যত্ন করে রাখল।", "গান গাইল।", "নিয়ে এল।"]


def sentence(chance: random.Random) -> str:
    return " ".join(chance.choice(part) for part in (WHO, WHEN, WHAT, DID))


@pytest.fixture(scope="session")
def corpus_texts() -> list[str]:
    """600 documents of one to eight sentences."""
    chance = random.Random(0)
    return [" ".join(sentence(chance) for _ in range(chance.randint(1, 8))) for _ in range(600)]


@pytest.fixture(scope="session")
def corpus_file(corpus_texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in corpus_texts), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def corpus_spec(corpus_file: Path) -> RunSpec:
    return RunSpec(
        name="test",
        model=ModelSpec(embedding_size=8, hidden_size=8, intermediate_size=8, layers=1, attention_heads=1),
        tokenizer=TokenizerSpec(vocab_size=150, training_documents=500),
        data=DataSpec(
            sources=(FileSource(kind="file", path=str(corpus_file)),),
            sequence_length=48,
            heldout_share=0.1,
            shuffle_buffer=50,
        ),
    )


@pytest.fixture(scope="session")
def corpus_tokenizer(corpus_spec: RunSpec) -> Tokenizer:
    return train_tokenizer(corpus_spec)
