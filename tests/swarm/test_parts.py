import pytest
import torch

from kantha.swarm.parts import CodecError, Layout, Part, decode, digest_of, encode


def normal(values: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(values, generator=torch.Generator().manual_seed(seed))


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize(("codec", "error", "width"), [("none", 0.0, 4.0), ("fp16", 3e-4, 2.0), ("8bit", 1e-2, 1.02)])
@pytest.mark.parametrize("values", [1, 255, 256, 257, 2**17])
def test_a_part_arrives_as_it_was_encoded(codec: str, error: float, width: float, values: int) -> None:
    part = Part(0, values, codec)
    encoded, told = encode(normal(values), part)
    arrived = decode(encoded, part)
    assert torch.equal(arrived, told)
    assert relative(arrived, normal(values)) <= error
    assert len(encoded) == part.bytes <= values * width + 4


def test_a_sparse_gradient_keeps_its_values_in_8_bits() -> None:
    sparse = torch.zeros(2**17)
    sparse[::97] = normal(len(sparse[::97]))
    assert relative(encode(sparse, Part(0, 2**17, "8bit"))[1], sparse) < 0.01


@pytest.mark.parametrize("codec", ["none", "fp16", "8bit"])
def test_zeros_stay_zeros(codec: str) -> None:
    assert float(encode(torch.zeros(1000), Part(0, 1000, codec))[1].abs().sum()) == 0.0


@pytest.mark.parametrize("codec", ["none", "fp16", "8bit"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_does_not_leave(codec: str, bad: float) -> None:
    values = normal(1000)
    values[7] = bad
    with pytest.raises(CodecError):
        encode(values, Part(0, 1000, codec))


@pytest.mark.parametrize("codec", ["none", "fp16", "8bit"])
def test_what_is_not_finite_or_of_another_length_does_not_get_in(codec: str) -> None:
    part = Part(0, 1000, codec)
    with pytest.raises(CodecError, match="not finite"):
        decode(b"\xff" * part.bytes, part)
    for length in (0, part.bytes - 1, part.bytes + 1):
        with pytest.raises(CodecError, match="bytes where"):
            decode(bytes(length), part)


def test_a_layout_covers_every_value_once_and_no_part_spans_two_tensors() -> None:
    shapes = [torch.Size([1000, 300]), torch.Size([768]), torch.Size([512, 512])]
    layout = Layout(shapes, "8bit")
    borders = {0, 300_000, 300_768, 300_768 + 512 * 512}
    assert layout.values == max(borders)
    assert [part.start for part in layout.parts] == [0, *(part.stop for part in layout.parts[:-1])]
    assert borders <= {0, *(part.stop for part in layout.parts)}
    assert {part.codec for part in layout.parts if part.values < 4096} == {"none"}


@pytest.mark.parametrize("reducers", [1, 2, 3, 7, 40])
def test_reducers_share_all_parts_about_equally(reducers: int) -> None:
    layout = Layout([torch.Size([3000, 1000])], "8bit")
    shares = layout.shares(reducers)
    assert len(shares) == reducers
    assert [index for share in shares for index in share] == list(range(len(layout.parts)))
    if reducers <= 7:
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_peers_with_other_tensors_or_codecs_have_another_layout() -> None:
    digests = {
        Layout([torch.Size([10, 20])], "8bit").digest,
        Layout([torch.Size([201])], "8bit").digest,
        Layout([torch.Size([10, 20])], "fp16").digest,
    }
    assert len(digests) == 3


def test_equal_bytes_have_equal_digests() -> None:
    digest = digest_of([b"a", b"bc"], {"asha": 3.0, "mitu": 4.0}, "")
    assert digest == digest_of([b"a", b"bc"], {"mitu": 4, "asha": 3}, "")
    others = [
        digest_of([b"a", b"bd"], {"asha": 3.0, "mitu": 4.0}, ""),
        digest_of([b"a", b"bc"], {"asha": 4.0, "mitu": 3.0}, ""),
        digest_of([b"a", b"bc"], {"asha": 3.0, "mitu": 4.0}, "anneal"),
    ]
    assert digest not in others
