"""How many finished training examples a second does one core make, against the way of sahajBERT (2021)?

That way: for each document, tokenize every sentence to count its tokens, join sentences until the example is full,
encode the joined pair again, and let the standard collator of `transformers` pad and mask. Kantha's: `ExampleStream`.
Both read and normalise the same documents, split them into the same sentences, make pairs of the same length and mask
the same share. Each runs in a process with one thread; the two take turns, and what counts is processor time.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

BATCH = 32


def spec_of(text: Path | None, length: int):
    from kantha.spec import PRESETS, FileSource, ShobdoSource

    demo = PRESETS["demo"]
    source = FileSource(kind="file", path=str(text)) if text else ShobdoSource(kind="shobdo")
    data = demo.data.model_copy(update={"sources": (source,), "sequence_length": length, "shuffle_buffer": 10_000})
    tokenizer = demo.tokenizer.model_copy(update={"vocab_size": 16_000})
    return demo.model_copy(update={"data": data, "tokenizer": tokenizer})


def ours(spec, tokenizer, examples: int) -> tuple[float, float]:
    """(tokens, share of the batches that is no padding)"""
    from kantha.corpus import ExampleStream

    stream = ExampleStream(spec, tokenizer, peer_seed=1)
    tokens = places = 0
    for _ in range(0, examples, BATCH):
        batch = stream.next_batch(BATCH)
        tokens += int(batch.attention_mask.sum())
        places += batch.input_ids.numel()
    return tokens, tokens / places


def theirs(spec, tokenizer, examples: int) -> tuple[float, float]:
    from transformers import DataCollatorForLanguageModeling, PreTrainedTokenizerFast

    from kantha.corpus import SPECIAL_TOKENS, read_documents, split_sentences

    names = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **dict(zip(names, SPECIAL_TOKENS, strict=True)))
    collate = DataCollatorForLanguageModeling(fast, mlm_probability=spec.objective.masked_share, pad_to_multiple_of=8)
    chance = random.Random(1)
    room = spec.data.sequence_length - 3

    def instances() -> Iterator[dict]:
        while True:
            for document in read_documents(spec.data.sources[0], spec.language, 1, spec.data.shuffle_buffer):
                chunk: list[str] = []
                tokens = 0
                sentences = split_sentences(document, spec.language)
                for number, sentence in enumerate(sentences, 1):
                    chunk.append(sentence)
                    tokens += len(fast.tokenize(sentence))
                    if number < len(sentences) and tokens < room:
                        continue
                    border = chance.randint(1, len(chunk) - 1) if len(chunk) > 1 else 1
                    first, second = " ".join(chunk[:border]), " ".join(chunk[border:])
                    swapped = chance.random() < 0.5
                    pair = (second, first) if swapped else (first, second)
                    encoded = fast(
                        *pair,
                        truncation="longest_first",
                        max_length=spec.data.sequence_length,
                        return_special_tokens_mask=True,
                    )
                    encoded["sentence_order_label"] = int(swapped)
                    yield encoded
                    chunk, tokens = [], 0

    source = instances()
    made = places = 0
    for _ in range(0, examples, BATCH):
        batch = collate(list(islice(source, BATCH)))
        made += int(batch["attention_mask"].sum())
        places += batch["input_ids"].numel()
    return made, made / places


def one(way: str, text: Path | None, length: int, tokenizer_file: Path, examples: int) -> None:
    """In a process of its own: print what one way does."""
    import torch

    from kantha.corpus import load_tokenizer

    torch.set_num_threads(1)
    spec, tokenizer = spec_of(text, length), load_tokenizer(tokenizer_file, None)
    run = {"ours": ours, "theirs": theirs}[way]
    run(spec, tokenizer, BATCH)  # imports, first use
    began = time.process_time()
    tokens, filled = run(spec, tokenizer, examples)
    seconds = time.process_time() - began
    print(json.dumps({"examples": examples / seconds, "tokens": tokens / seconds, "filled": filled}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, help="a .txt or .jsonl file; default: the dictionary shobdo")
    parser.add_argument("--length", type=int, default=128, help="tokens of an example (default 128)")
    parser.add_argument("--examples", type=int, default=40_000, help="that Kantha makes in a turn (default 40,000)")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--way", choices=("ours", "theirs"), help=argparse.SUPPRESS)
    parser.add_argument("--tokenizer", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.way:
        one(options.way, options.text, options.length, options.tokenizer, options.examples)
        return

    from kantha.corpus import save_tokenizer, train_tokenizer

    with tempfile.TemporaryDirectory() as folder:
        tokenizer = Path(folder) / "tokenizer.json"
        print("training a tokenizer …", flush=True)
        save_tokenizer(train_tokenizer(spec_of(options.text, options.length)), tokenizer)
        found: dict[str, list[dict[str, float]]] = {"theirs": [], "ours": []}
        print(f"{'':8} {'examples/s':>10} {'tokens/s':>10} {'no padding':>10}")
        for _ in range(options.turns):
            for way, results in found.items():
                command = [sys.executable, __file__, "--way", way, "--tokenizer", str(tokenizer)]
                command += ["--length", str(options.length)]
                command += ["--examples", str(options.examples if way == "ours" else options.examples // 8)]
                command += ["--text", str(options.text)] if options.text else []
                threads = {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
                output = subprocess.run(command, env=os.environ | threads, check=True, stdout=subprocess.PIPE).stdout
                results.append(json.loads(output))
                now = results[-1]
                print(f"{way:8} {now['examples']:10.0f} {now['tokens']:10.0f} {now['filled']:10.0%}", flush=True)
    ratios = [mine["examples"] / other["examples"] for mine, other in zip(found["ours"], found["theirs"], strict=True)]
    rates = {way: statistics.median(result["examples"] for result in results) for way, results in found.items()}
    print(f"ratio {statistics.median(ratios):.2f} (median of {', '.join(f'{ratio:.2f}' for ratio in ratios)})")
    if options.json:
        options.json.write_text(
            json.dumps(
                {
                    "examples_per_second": rates["ours"],
                    "baseline_examples_per_second": rates["theirs"],
                    "ratio": statistics.median(ratios),
                }
            )
        )


if __name__ == "__main__":
    main()
