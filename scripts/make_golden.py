"""Record what auto-gptq 0.7.1 computes for a few small act-order layers, as test answers.

Random linears are quantised by auto-gptq's own GPTQ class (4 bits, actorder=True), packed by its
`cuda` QuantLinear, and computed by it on the CPU, where it uses g_idx in plain torch. Two files
are written, autogptq-sym.safetensors and autogptq-asym.safetensors. Each holds for every layer L:

    L.qweight, L.qzeros, L.scales, L.g_idx   as packed (and L.bias for layer b)
    L.weight   the (K, N) fp16 weight: the answer to an identity matrix, without the bias
    L.x, L.y   a random fp16 input (7, K) and the answer to it, with the bias

Layer d has a ragged last group. Layer "wrap" (asym only) has zero points of 0, whose stored value
0 - 1 auto-gptq packs as 0xffffffff: the field itself and all fields above it in the same int32
become 15, and auto-gptq computes 16 for each of them. That conversion of -1.0 to uint32 is what
x86 does; other processors may give another file.

Environment (Python 3.11):

    pip install torch==2.13.0 transformers==4.53.3 peft==0.16.0 accelerate numpy rouge gekko \
        datasets==3.6.0 sentencepiece
    pip install --no-deps auto-gptq==0.7.1

Usage:

    python scripts/make_golden.py tests/golden
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import torch
from auto_gptq.nn_modules.qlinear.qlinear_cuda import QuantLinear
from auto_gptq.quantization.gptq import GPTQ
from safetensors.torch import save_file

BITS = 4


class Layer(NamedTuple):
    """The shape of one layer: K input and N output features."""

    k: int
    n: int
    group_size: int
    bias: bool = False


LAYERS = {
    "a": Layer(128, 64, 32),
    "b": Layer(256, 128, 64, bias=True),
    "c": Layer(96, 64, 32),
    "d": Layer(160, 64, 64),
    "e": Layer(128, 64, -1),
}
WRAP = Layer(64, 32, 32)


def random_linear(layer: Layer, rng: torch.Generator) -> torch.nn.Linear:
    """A linear with normal fp16 weights; each output feature has its own scale and offset."""
    linear = torch.nn.Linear(layer.k, layer.n, bias=layer.bias)
    spread = 0.02 + 0.1 * torch.rand(layer.n, 1, generator=rng)
    shift = 0.3 * torch.randn(layer.n, 1, generator=rng)
    weight = spread * (torch.randn(layer.n, layer.k, generator=rng) + shift)
    linear.weight.data = weight.half()
    if layer.bias:
        linear.bias.data = torch.randn(layer.n, generator=rng).half()
    return linear


def channel_energies(k: int, rng: torch.Generator) -> torch.Tensor:
    """Strongly uneven standard deviations of the input channels."""
    return torch.exp(1.5 * torch.randn(k, generator=rng))


def quantise(
    linear: torch.nn.Linear, group_size: int, sym: bool, inputs: torch.Tensor
) -> QuantLinear:
    """Quantise and pack with auto-gptq, in activation order of the inputs."""
    gptq = GPTQ(linear)
    gptq.quantizer.configure(BITS, perchannel=True, sym=sym, mse=False)
    gptq.add_batch(inputs, None)
    with patch("torch.cuda.synchronize", lambda: None):
        scales, zeros, g_idx = gptq.fasterquant(group_size=group_size, actorder=True)
    packed = QuantLinear(
        BITS, group_size, linear.in_features, linear.out_features, linear.bias is not None
    )
    packed.pack(linear, scales, zeros, g_idx)
    return packed


@torch.inference_mode()
def answers(packed: QuantLinear, rng: torch.Generator) -> dict[str, torch.Tensor]:
    """The packed tensors and what auto-gptq computes with them."""
    tensors = packed.state_dict()
    x = torch.randn(7, packed.infeatures, generator=rng).half()
    y = packed(x)
    packed.bias = None
    weight = packed(torch.eye(packed.infeatures, dtype=torch.float16))
    return {**tensors, "weight": weight, "x": x, "y": y}


def random_layer(layer: Layer, sym: bool, rng: torch.Generator) -> QuantLinear:
    """A random linear quantised on random inputs."""
    linear = random_linear(layer, rng)
    inputs = torch.randn(512, layer.k, generator=rng) * channel_energies(layer.k, rng)
    return quantise(linear, layer.group_size, sym, inputs)


def wrap_layer(rng: torch.Generator) -> QuantLinear:
    """An asymmetric layer some of whose zero points are 0.

    Weights are positive in features 3, 15 and 24 (all rows) and 16 (the rows of group 0, which
    are the channels of most energy).
    """
    linear = random_linear(WRAP, rng)
    energies = channel_energies(WRAP.k, rng)
    inputs = torch.randn(512, WRAP.k, generator=rng) * energies
    strongest = inputs.square().sum(0).argsort(descending=True)[: WRAP.group_size]
    weight = linear.weight.data
    weight[[3, 15, 24]] = weight[[3, 15, 24]].abs() + 0.1
    weight[16, strongest] = weight[16, strongest].abs() + 0.1
    return quantise(linear, WRAP.group_size, False, inputs)


def count_stored_15(qzeros: torch.Tensor) -> int:
    """How many 4-bit fields of qzeros hold 15."""
    fields = (qzeros.unsqueeze(-1) >> torch.arange(0, 32, BITS)) & 15
    return int((fields == 15).sum())


def make_file(path: Path, sym: bool) -> None:
    """Quantise all layers one way and write them with their answers."""
    rng = torch.Generator().manual_seed(0)
    layers = {name: random_layer(layer, sym, rng) for name, layer in LAYERS.items()}
    group_sizes = {name: layer.group_size for name, layer in LAYERS.items()}
    if not sym:
        layers["wrap"] = wrap_layer(rng)
        group_sizes["wrap"] = WRAP.group_size
    tensors = {}
    for name, packed in layers.items():
        print(f"{path.name} {name}: {count_stored_15(packed.qzeros)} zero fields store 15")
        for key, tensor in answers(packed, rng).items():
            tensors[f"{name}.{key}"] = tensor.contiguous()
    metadata = {
        "auto_gptq": "0.7.1",
        "bits": str(BITS),
        "group_sizes": json.dumps(group_sizes),
        "sym": json.dumps(sym),
    }
    save_file(tensors, path, metadata)
    print(f"{path.name}: {path.stat().st_size} bytes")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="output directory")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    for sym in (True, False):
        make_file(args.out / f"autogptq-{'sym' if sym else 'asym'}.safetensors", sym)


if __name__ == "__main__":
    main()
