"""Labelled data that a small model can learn in seconds, and the files that they come in."""

import json
import random
from collections.abc import Sequence
from pathlib import Path

from kantha.evaluation.labelled import Sentence, Text

# Words of the tiny run's text, so that its tokenizer knows them.
TOPICS = {"river": "নদীর ঘাটে বসে", "food": "ইলিশ মাছ"}
WHEN = ["আজ সকালে", "গতকাল বিকেলে", "প্রতিদিন", "বর্ষার রাতে", "শীতের দিনে", "মেলার শেষে"]
NAMES = ["রহিম", "সীমা", "শিক্ষক", "মাঝি", "কাকা", "জেলে"]
DID = ["হাসল", "কিনে", "খুঁজে"]  # after a person
WHERE = ["নদীর", "মাঠে", "ঘাটে"]  # after a place that is called like a person


def texts(count: int, seed: int) -> list[Text]:
    """The topic is that of the phrase in the middle; the rest says nothing. Rivers are the most frequent."""
    chance = random.Random(seed)
    found = []
    for i in range(count):
        topic = chance.choice(["river", "river", "food"])
        found.append(Text(f"{chance.choice(WHEN)} {TOPICS[topic]} {chance.choice(WHEN)} {i}", topic))
    return found


def sentences(count: int, seed: int) -> list[Sentence]:
    """A name is a person's or a place's, by the word that follows; the name itself does not tell."""
    chance = random.Random(seed)
    found = []
    for i in range(count):
        kind, following = chance.choice([("PER", DID), ("LOC", WHERE)])
        words = (*chance.choice(WHEN).split(), chance.choice(NAMES), chance.choice(following), str(i))
        found.append(Sentence(words, tuple(f"B-{kind}" if word in NAMES else "O" for word in words)))
    return found


def write_topics(path: Path, examples: Sequence[Text]) -> Path:
    records = [{"text": example.text, "label": example.topic} for example in examples]
    path.write_text("\n".join(json.dumps(record, ensure_ascii=False) for record in records), encoding="utf-8")
    return path


def write_entities(path: Path, examples: Sequence[Sentence]) -> Path:
    blocks = ["\n".join(map("\t".join, zip(*example, strict=True))) for example in examples]
    path.write_text("\n\n".join(blocks) + "\n", encoding="utf-8")
    return path
