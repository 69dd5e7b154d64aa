from collections.abc import Callable
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer

from kantha.corpus import Batch, ExampleStream
from kantha.errors import DeviceMemoryError
from kantha.model import build_model
from kantha.spec import RunSpec
from kantha.training import Trainer, choose_device, describe_device, full_batch
from kantha.training import trainer as module

CPU = torch.device("cpu")


def plain_gradients(spec: RunSpec, batch: Batch) -> tuple[float, list[torch.Tensor]]:
    """Loss and gradients as `transformers` and autograd alone give them, with logits for every token."""
    model = build_model(spec)
    labels = torch.full(batch.input_ids.shape, -100)
    labels.view(-1)[batch.masked_positions] = batch.masked_labels
    loss = model(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        token_type_ids=batch.token_type_ids,
        labels=labels,
        sentence_order_label=batch.swapped,
    ).loss
    loss.backward()
    return loss.item(), [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]


def test_gradients_are_those_of_plain_autograd(tiny_spec: RunSpec, tiny_batches: list[Batch]) -> None:
    trainer = Trainer(tiny_spec, CPU)
    for batch in tiny_batches:  # one after the other: nothing of a batch may be left in the next
        gradients = trainer.compute([batch])
        loss, expected = plain_gradients(tiny_spec, batch)
        assert gradients is not None
        assert gradients.samples == 4
        assert gradients.mlm_loss + gradients.sop_loss == pytest.approx(loss, abs=1e-5)
        assert gradients.mlm_loss > 3.0 > gradients.sop_loss  # near log 200 and log 2
        assert any(tensor.any() for tensor in expected)
        for mine, plain in zip(gradients.tensors, expected, strict=True):
            torch.testing.assert_close(mine, plain, rtol=1e-4, atol=1e-6)


def test_some_batches_together_count_as_one_large_batch(
    tiny_spec: RunSpec, tiny_tokenizer: Tokenizer, tiny_batches: list[Batch]
) -> None:
    small = ExampleStream(tiny_spec, tiny_tokenizer, peer_seed=3).next_batch(1)
    trainer = Trainer(tiny_spec, CPU)
    gradients = trainer.compute(iter([tiny_batches[0], small]))
    assert gradients is not None
    assert gradients.samples == 5
    losses, plain = zip(*(plain_gradients(tiny_spec, batch) for batch in (tiny_batches[0], small)), strict=True)
    assert gradients.mlm_loss + gradients.sop_loss == pytest.approx((4 * losses[0] + losses[1]) / 5, abs=1e-5)
    for mine, first, second in zip(gradients.tensors, *plain, strict=True):
        torch.testing.assert_close(mine, (4 * first + second) / 5, rtol=1e-4, atol=1e-6)


def test_no_batch_has_no_gradient(tiny_spec: RunSpec) -> None:
    with pytest.raises(ValueError, match="no batch"):
        Trainer(tiny_spec, CPU).compute([])


def test_the_swarms_parameters_are_taken_over(tiny_spec: RunSpec, tiny_batches: list[Batch]) -> None:
    other_spec = tiny_spec.model_copy(update={"seed": 99})
    expected = Trainer(other_spec, CPU).compute([tiny_batches[0]])
    trainer = Trainer(tiny_spec, CPU)
    swarm = list(build_model(other_spec).parameters())
    trainer.load(swarm)
    gradients = trainer.compute([tiny_batches[0]])
    assert gradients is not None
    assert expected is not None
    assert gradients.mlm_loss == expected.mlm_loss
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(gradients.tensors, expected.tensors, strict=True))


def test_gradients_that_are_not_finite_are_not_handed_out(tiny_spec: RunSpec, tiny_batches: list[Batch]) -> None:
    trainer = Trainer(tiny_spec, CPU)
    good = [p.detach().clone() for p in build_model(tiny_spec).parameters()]
    for poison in (float("nan"), float("inf")):
        bad = [p.clone() for p in good]
        bad[0][:] = poison  # the embeddings of all tokens
        trainer.load(bad)
        assert trainer.compute([tiny_batches[0]]) is None
    trainer.load(good)
    assert trainer.compute([tiny_batches[0]]) is not None


def test_this_machines_device_fits_into_a_report() -> None:
    device = choose_device()
    assert device.type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert 0 < len(describe_device(CPU)) <= 60
    assert "cores" in describe_device(CPU)


@pytest.mark.parametrize(("dtype", "most"), [(torch.float16, 0.02), (torch.bfloat16, 0.1)])
def test_the_precisions_of_gpus_give_nearly_the_same(
    tiny_spec: RunSpec, tiny_batches: list[Batch], monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, most: float
) -> None:
    expected = Trainer(tiny_spec, CPU).compute(tiny_batches)
    monkeypatch.setattr(module, "choose_dtype", lambda _: dtype)  # a CPU has them as well
    trainer = Trainer(tiny_spec, CPU)
    gradients = next(found for _ in range(20) if (found := trainer.compute(tiny_batches)))  # fp16 looks for its scale
    assert expected is not None
    assert gradients.mlm_loss == pytest.approx(expected.mlm_loss, rel=0.01)
    far = [(mine - plain).norm() for mine, plain in zip(gradients.tensors, expected.tensors, strict=True)]
    assert 0 < torch.stack(far).norm() < most * torch.stack([plain.norm() for plain in expected.tensors]).norm()


# ---- memory


def too_large_for(trainer: Trainer, most: int, where: str = "forward") -> list[int]:
    """Makes the trainer's device one that runs out of memory with more than `most` examples; sizes that were tried."""
    tried: list[int] = []

    def check(size: int) -> None:
        tried.append(size)
        if size > most:
            raise torch.OutOfMemoryError("a device of this test")

    if where == "forward":
        trainer._model.albert.register_forward_pre_hook(
            lambda _, __, given: check(len(given["input_ids"])), with_kwargs=True
        )
    else:  # when the gradients of most parameters are there
        trainer._model.albert.encoder.embedding_hidden_mapping_in.register_full_backward_hook(
            lambda _, __, given: check(len(given[0]))
        )
    return tried


@pytest.fixture
def batch_of_7(tiny_spec: RunSpec, tiny_tokenizer: Tokenizer) -> Batch:
    return ExampleStream(tiny_spec, tiny_tokenizer, peer_seed=5).next_batch(7)


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_a_batch_that_does_not_fit_is_computed_in_parts_to_the_same_gradients(
    tiny_spec: RunSpec, tiny_batches: list[Batch], batch_of_7: Batch, where: str
) -> None:
    expected = Trainer(tiny_spec, CPU).compute([tiny_batches[0], batch_of_7])
    trainer = Trainer(tiny_spec, CPU)
    tried = too_large_for(trainer, 3, where)
    gradients = trainer.compute([tiny_batches[0], batch_of_7])
    assert tried == [4, 2, 2, 2, 2, 2, 1]
    assert trainer.micro_batch == 2
    assert len({len(part.masked_labels) / part.size for part in batch_of_7.split(2)}) > 1  # so that weights matter
    assert gradients is not None
    assert expected is not None
    assert (gradients.samples, gradients.tokens, gradients.flops) == (11, expected.tokens, expected.flops)
    assert gradients.mlm_loss == pytest.approx(expected.mlm_loss, rel=1e-5)
    assert gradients.sop_loss == pytest.approx(expected.sop_loss, rel=1e-5)
    for mine, whole in zip(gradients.tensors, expected.tensors, strict=True):
        torch.testing.assert_close(mine, whole, rtol=1e-4, atol=1e-6)


def test_what_fits_is_not_found_out_again(tiny_spec: RunSpec, batch_of_7: Batch) -> None:
    trainer = Trainer(tiny_spec, CPU)
    tried = too_large_for(trainer, 3)
    trainer.compute([batch_of_7])
    assert tried == [7, 4, 2, 2, 2, 1]
    tried.clear()
    trainer.compute([batch_of_7])
    assert tried == [2, 2, 2, 1]


def test_a_device_that_has_no_memory_for_one_example_is_an_error(tiny_spec: RunSpec, batch_of_7: Batch) -> None:
    trainer = Trainer(tiny_spec, CPU)
    too_large_for(trainer, 0)
    with pytest.raises(DeviceMemoryError, match="not even one example") as caught:
        trainer.compute([batch_of_7])
    assert caught.value.exit_code == 18
    with pytest.raises(DeviceMemoryError):
        trainer.find_micro_batch()


def test_other_errors_of_a_step_are_not_taken_for_a_lack_of_memory(tiny_spec: RunSpec, batch_of_7: Batch) -> None:
    trainer = Trainer(tiny_spec, CPU)

    def fail(*_: object) -> None:
        raise RuntimeError("a bug")

    trainer._model.albert.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="a bug"):
        trainer.compute([batch_of_7])


def test_the_full_batch_is_as_large_as_any(tiny_spec: RunSpec) -> None:
    batch = full_batch(tiny_spec, 5)
    assert batch.input_ids.shape == (5, tiny_spec.data.sequence_length)
    assert len(batch.masked_labels) == int(tiny_spec.objective.masked_share * batch.input_ids.numel())
    assert not batch.attention_mask.all()


@pytest.mark.parametrize(
    ("seconds", "most", "expected"),
    [
        (lambda size: 0.1, 512, 512),  # all sizes take the same time, as on a GPU that has little to do
        (lambda size: 0.1, 40, 32),  # the largest that fits
        (lambda size: 0.1 + 0.01 * size, 512, 128),  # 64: 86 a second, 128: 93 after more than a second
        (lambda size: 0.001 * size, 512, 1),  # a larger one is no faster
        (lambda size: 0.02 if size == 2 else 0.01, 512, 512),  # one that something disturbed does not end the search
        (lambda size: 3.7 * size, 512, 1),
    ],
)
def test_the_micro_batch_is_the_fastest_that_fits(
    tiny_spec: RunSpec, seconds: Callable[[int], float], most: int, expected: int
) -> None:
    trainer, tried = Trainer(tiny_spec, CPU), []

    def step(size: int) -> float:
        tried.append(size)
        if size > most:
            raise torch.OutOfMemoryError
        return seconds(size)

    trainer._seconds = step  # type: ignore[method-assign]
    trainer.find_micro_batch()
    assert trainer.micro_batch == expected
    assert sum(map(seconds, tried)) < 6.0


def test_a_trainer_finds_its_micro_batch_by_itself(tiny_spec: RunSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_GAIN", 0.0)  # whatever fits is taken for faster
    trainer = Trainer(tiny_spec, CPU)
    tried = too_large_for(trainer, 4)
    trainer.find_micro_batch()
    assert trainer.micro_batch == 4
    assert max(tried) == 8


def test_a_cpu_computes_512_tokens_at_once_or_what_the_volunteer_says(tiny_spec: RunSpec) -> None:
    for length, expected in ((32, 16), (24, 21), (1024, 1)):
        data = tiny_spec.data.model_copy(update={"sequence_length": length})
        trainer = Trainer(tiny_spec.model_copy(update={"data": data}), CPU)
        trainer.prepare(None, print)
        assert trainer.micro_batch == expected
        trainer.prepare(3, print)
        assert trainer.micro_batch == 3


# ---- compiling


@pytest.fixture
def faster(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is compiled is taken for faster."""
    monkeypatch.setattr(module, "_GAIN", 0.0)


def compile_with(monkeypatch: pytest.MonkeyPatch, backend: Any) -> None:
    """PyTorch's own graphs, without the minute in which a C++ compiler makes a program of them."""
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda *given, **options: real(*given, **options, backend=backend))


def assert_computes_the_same(trainer: Trainer, spec: RunSpec, batches: list[Batch]) -> None:
    expected, gradients = Trainer(spec, CPU).compute(batches), trainer.compute(batches)
    assert expected is not None
    assert gradients is not None
    assert gradients.mlm_loss == pytest.approx(expected.mlm_loss, rel=1e-5)
    for mine, plain in zip(gradients.tensors, expected.tensors, strict=True):
        torch.testing.assert_close(mine, plain, rtol=1e-4, atol=1e-6)


@pytest.mark.usefixtures("faster")
def test_a_compiled_trainer_computes_the_same_in_the_same_order_of_parameters(
    tiny_spec: RunSpec, tiny_batches: list[Batch], batch_of_7: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    compile_with(monkeypatch, "eager")
    trainer = Trainer(tiny_spec, CPU)
    names = list(trainer._model.state_dict())
    trainer.micro_batch = 4
    trainer.compile()
    assert trainer._compiled
    assert list(trainer._model.state_dict()) == names
    trainer.load(build_model(tiny_spec.model_copy(update={"seed": 99})).parameters())
    assert_computes_the_same(trainer, tiny_spec.model_copy(update={"seed": 99}), [*tiny_batches, batch_of_7])


def test_where_the_compiler_fails_the_model_is_used_as_it_is(
    tiny_spec: RunSpec,
    tiny_batches: list[Batch],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def no_compiler(*_: object) -> None:
        raise RuntimeError("no C++ compiler")

    compile_with(monkeypatch, no_compiler)
    trainer = Trainer(tiny_spec, CPU)
    trainer.micro_batch = 4
    trainer.compile()
    assert not trainer._compiled
    assert "no C++ compiler" in caplog.text
    assert_computes_the_same(trainer, tiny_spec, tiny_batches)


def test_a_compiled_model_that_is_no_faster_is_not_used(
    tiny_spec: RunSpec, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    compile_with(monkeypatch, "eager")
    monkeypatch.setattr(module, "_GAIN", 1e9)
    trainer = Trainer(tiny_spec, CPU)
    trainer.micro_batch = 4
    trainer.compile()
    assert not trainer._compiled
    assert "no faster" in caplog.text


@pytest.mark.usefixtures("faster")
@pytest.mark.parametrize("factor", [1.5, float("nan")])
def test_a_compiled_model_that_computes_something_else_is_not_used(
    tiny_spec: RunSpec,
    tiny_batches: list[Batch],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    factor: float,
) -> None:
    monkeypatch.setattr(
        torch, "compile", lambda forward, **_: lambda *given, **named: forward(*given, **named) * factor
    )
    trainer = Trainer(tiny_spec, CPU)
    trainer.micro_batch = 4
    trainer.compile()
    assert not trainer._compiled
    assert "does not compute the same" in caplog.text
    assert_computes_the_same(trainer, tiny_spec, tiny_batches)


@pytest.mark.usefixtures("faster")
def test_a_compiled_model_that_fails_later_is_given_up_and_no_sample_is_lost(
    tiny_spec: RunSpec,
    tiny_batches: list[Batch],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    fails = False

    def compiled(forward: Callable[..., Any], **_: Any) -> Callable[..., Any]:
        def run(*given: Any, **named: Any) -> Any:
            if fails:
                raise RuntimeError("this shape does not compile")
            return forward(*given, **named)

        return run

    monkeypatch.setattr(torch, "compile", compiled)
    trainer = Trainer(tiny_spec, CPU)
    trainer.micro_batch = 4
    trainer.compile()
    assert trainer._compiled
    fails = True
    assert_computes_the_same(trainer, tiny_spec, tiny_batches)
    assert not trainer._compiled
    assert "this shape does not compile" in caplog.text
