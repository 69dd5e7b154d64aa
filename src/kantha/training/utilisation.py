"""How much of a GPU the training uses: model FLOPs utilisation, as in PaLM (Chowdhery et al. 2022, arXiv 2204.02311,
appendix B): the operations that the model needs, over what the device could do in the same time.

Operations of matrix products alone, forward and backward (three times the forward), of real tokens: padding does not
count, nor would anything that is computed twice.
"""

import torch

from kantha.corpus import Batch
from kantha.spec import RunSpec

# Dense operations per second by the device's name, as `torch.cuda.get_device_name` has it: tensor cores that add up in
# fp32, on bf16 or fp16 operands, which are equally fast. A device that is not here reports no utilisation: names that
# only look alike ("RTX 4070 Laptop GPU") are other chips.
_PEAK = {
    "Tesla T4": 65e12,  # NVIDIA's data sheet of the T4; of the P100 (which has no tensor cores), and so on
    "Tesla P100-PCIE-16GB": 18.7e12,
    "Tesla V100-PCIE-16GB": 112e12,
    "Tesla V100-PCIE-32GB": 112e12,
    "Tesla V100-SXM2-16GB": 125e12,
    "Tesla V100-SXM2-32GB": 125e12,
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA H100 PCIe": 756e12,  # half of the data sheet's figure, which is with sparsity; so for the next two
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA L4": 121e12,
    # whitepaper "NVIDIA Ampere GA102 GPU Architecture", "Peak FP16 Tensor TFLOPS with FP32 Accumulate"; the 3060 is not
    # in it: 28 SMs at 1.78 GHz with 256 multiply-adds a clock, as the 3090 has them in 82 SMs at 1.70 GHz
    "NVIDIA GeForce RTX 3060": 25.5e12,
    "NVIDIA GeForce RTX 3070": 40.6e12,
    "NVIDIA GeForce RTX 3080": 59.5e12,
    "NVIDIA GeForce RTX 3090": 71e12,
    # whitepaper "NVIDIA Ada GPU Architecture", the same line; the 4060 and the 4070 are not in it: an eighth of the
    # "AI TOPS" of their product pages (242 and 466: fp8, sparse, fp16 sums), as 165.2 is of the 4090's 1321
    "NVIDIA GeForce RTX 4060": 30.2e12,
    "NVIDIA GeForce RTX 4070": 58.3e12,
    "NVIDIA GeForce RTX 4080": 97.5e12,
    "NVIDIA GeForce RTX 4090": 165.2e12,
}


def peak_flops(device: torch.device) -> float | None:
    """Dense operations per second of a GPU in the precision that Kantha trains in; None where that is not known."""
    return _PEAK.get(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def training_flops(spec: RunSpec, batch: Batch) -> float:
    """Operations of one training step of `pretraining_losses` on a batch.

    With E the embedding's width, H the hidden one, F the feed-forward one, V the vocabulary, and n the tokens of an
    example, forward: 2·EH a token; in each layer, shared or not, 2·(4H² + 2HF) a token and 4·n²·H an example for the
    attention (its scores, and the mean of values); 2·(HE + EV) a masked token; 2·(H² + 2H) an example for the order.
    """
    model = spec.model
    lengths = batch.attention_mask.sum(1, dtype=torch.float64)
    e, h, f, v = model.embedding_size, model.hidden_size, model.intermediate_size, spec.tokenizer.vocab_size
    tokens, pairs = float(lengths.sum()), float(lengths.square().sum())
    body = 2 * tokens * (e * h + model.layers * (4 * h * h + 2 * h * f)) + 4 * model.layers * h * pairs
    heads = 2 * len(batch.masked_labels) * (h * e + e * v) + 2 * batch.size * (h * h + 2 * h)
    return 3 * (body + heads)
