from pathlib import Path

import pytest
from transformers import AlbertForMaskedLM, AlbertForPreTraining, AutoTokenizer, BertConfig, BertForPreTraining

from kantha.coordinator.rundir import RunDirectory
from kantha.corpus import heldout_batches, load_tokenizer
from kantha.errors import CorpusError, RunDirectoryError
from kantha.evaluation import heldout_loss
from kantha.evaluation.pretraining import PretrainingTest, text_spec
from kantha.evaluation.results import Score

TEXT = "রহিম আজ সকালে লাল কাঁথা খুঁজে পেল। সীমা মেলার শেষে ইলিশ মাছ কিনে আনল। নতুন শিক্ষক দেখে হাসল!"


def silent(*_: object) -> None: ...


def test_masked_tokens_and_sentence_order_of_heldout_documents(run: RunDirectory, model_folder: str) -> None:
    test = PretrainingTest(model_folder, run.spec)
    tokens, words, runs, frequent = test.mlm(silent)
    order, majority = test.sop(silent)

    tokenizer = load_tokenizer(run.tokenizer, run.spec.tokenizer.sha256)
    batches = heldout_batches(run.spec, tokenizer, 1000, 32, "token")
    model = AlbertForPreTraining.from_pretrained(model_folder).eval()
    assert tokens.metrics["loss"] == pytest.approx(heldout_loss(model, batches), rel=1e-5)
    right_tokens = right_orders = masked = pairs = 0
    for batch in batches:
        whole = model(batch.input_ids, batch.attention_mask, batch.token_type_ids)
        guesses = whole.prediction_logits.flatten(0, 1)[batch.masked_positions].argmax(-1)
        right_tokens += int((guesses == batch.masked_labels).sum())
        right_orders += int((whole.sop_logits.argmax(-1) == batch.swapped).sum())
        masked += len(batch.masked_labels)
        pairs += batch.size
    assert (test.masked, test.pairs) == (masked, pairs)
    assert tokens.metrics["accuracy"] == right_tokens / masked
    assert order == Score("as pretrained", {"accuracy": right_orders / pairs})
    assert words.metrics["loss"] != runs.metrics["loss"] != tokens.metrics["loss"]
    assert 0 < frequent.metrics["accuracy"] < 0.5
    assert 0.5 <= majority.metrics["accuracy"] < 0.7


def test_all_of_a_text_of_ones_own_is_used(run: RunDirectory, model_folder: str, tmp_path: Path) -> None:
    text = tmp_path / "own.txt"
    text.write_text("\n".join(f"{TEXT} {i}" for i in range(20)), encoding="utf-8")
    for of_run in (None, run.spec):
        spec = text_spec(text, model_folder, of_run)
        assert spec.data.sequence_length == (32 if of_run else 40)
        test = PretrainingTest(model_folder, spec)
        assert test.pairs >= 20
        assert next(test.mlm(silent)).metrics["loss"] > 0


def test_a_text_of_ones_own_that_is_not_there(model_folder: str, tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=r"none\.txt"):
        PretrainingTest(model_folder, text_spec(tmp_path / "none.txt", model_folder, None))


def test_a_model_without_the_head_for_sentence_order(run: RunDirectory, model_folder: str, tmp_path: Path) -> None:
    AlbertForMaskedLM.from_pretrained(model_folder).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(model_folder).save_pretrained(tmp_path)
    with pytest.raises(RunDirectoryError, match="is not an AlbertForPreTraining"):
        PretrainingTest(str(tmp_path), run.spec)


def test_a_model_of_another_kind(run: RunDirectory, model_folder: str, tmp_path: Path) -> None:
    config = BertConfig(
        vocab_size=200, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1
    )
    BertForPreTraining(config).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(model_folder).save_pretrained(tmp_path)
    with pytest.raises(RunDirectoryError, match="mlm and sop are for an ALBERT"):
        PretrainingTest(str(tmp_path), run.spec)
