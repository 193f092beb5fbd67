"""The runtime's kernels against its plain form, as shipped: on a GPU or in Triton's interpreter."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from tpgptq_convert import tpgptq_runtime
from tpgptq_convert.packing import pack_cols, pack_rows, unpack_rows

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Triton's interpreter has no arithmetic for bfloat16.
DTYPES = [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]


@pytest.fixture(scope="module")
def runtime(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """The module, imported from a directory where the package is not."""
    path = tmp_path_factory.mktemp("out") / "tpgptq_runtime.py"
    shutil.copy(tpgptq_runtime.__file__, path)
    spec = importlib.util.spec_from_file_location("shipped_kernels", path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def poison() -> Iterator[None]:
    """Memory that torch hands out is full of NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def shard(
    k: int,
    n: int,
    group_size: int,
    *,
    bits: int = 4,
    sym: bool = True,
    checkpoint_format: str = "gptq",
    perm: bool = True,
    dead: bool = False,
    bias: bool = False,
    scales: torch.dtype = torch.float16,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Random tensors of a rank's layer; dead: some rows at each group's end are padding."""
    torch.manual_seed(seed)
    groups = k // group_size
    values = torch.randint(0, 2**bits, (k, n))
    zeros = torch.randint(1, 2**bits, (groups, n))
    if sym:
        zeros[:] = 2 ** (bits - 1)
    if dead:
        padding = torch.arange(group_size) >= torch.randint(1, group_size, (groups, 1))
        of_row = zeros.repeat_interleave(group_size, 0)
        values = torch.where(padding.view(k, 1), of_row, values)
    stored = zeros - (1 if checkpoint_format == "gptq" else 0)
    tensors = {
        "qweight": pack_rows(values.int(), bits),
        "qzeros": pack_cols(stored.int(), bits),
        "scales": (torch.rand(groups, n) * 0.01 + 0.002).to(scales),
    }
    if perm:
        tensors["perm"] = torch.randint(0, k, (k,), dtype=torch.int32)
    if bias:
        tensors["bias"] = torch.randn(n).half()
    return {name: tensor.to(DEVICE) for name, tensor in tensors.items()}


def error(out: Tensor, exact: Tensor) -> float:
    return float((out.double() - exact).norm() / exact.norm())


def check(out: Tensor, x: Tensor, linear: Any) -> None:
    """The three-way rule: at most twice as far from float64 as the plain form in x's dtype."""
    exact = linear(x.double())
    assert out.shape == exact.shape
    assert out.dtype == x.dtype
    assert error(out, exact) <= 2 * error(linear(x), exact)


CASES = {
    "g128": {"k": 512, "n": 192, "group_size": 128},
    "g128, no perm": {"k": 512, "n": 128, "group_size": 128, "perm": False},
    "g64, bias": {"k": 256, "n": 256, "group_size": 64, "bias": True},
    "g32, asym": {"k": 256, "n": 64, "group_size": 32, "sym": False},
    "g16": {"k": 192, "n": 64, "group_size": 16},
    "g8": {"k": 192, "n": 64, "group_size": 8},
    "g8, asym, no perm": {"k": 64, "n": 64, "group_size": 8, "sym": False, "perm": False},
    "g24": {"k": 240, "n": 64, "group_size": 24},
    "g48": {"k": 384, "n": 64, "group_size": 48},
    "g192": {"k": 768, "n": 64, "group_size": 192, "sym": False},
    "32-bit scales, g32": {"k": 256, "n": 64, "group_size": 32, "scales": torch.float32},
    "32-bit scales, g16": {
        **{"k": 192, "n": 64, "group_size": 16, "sym": False},
        "scales": torch.float32,
    },
    "one group": {"k": 448, "n": 64, "group_size": 448},
    "odd sizes": {"k": 320, "n": 104, "group_size": 32, "perm": False, "bias": True},
    "padding": {"k": 1024, "n": 64, "group_size": 32, "dead": True, "sym": False},
    "v2": {"k": 256, "n": 64, "group_size": 64, "checkpoint_format": "gptq_v2", "sym": False},
    "8 bits": {"k": 256, "n": 128, "group_size": 128, "bits": 8},
    "8 bits, asym": {"k": 256, "n": 64, "group_size": 32, "bits": 8, "sym": False},
    "2 bits": {"k": 512, "n": 64, "group_size": 64, "bits": 2, "sym": False},
    "8 bits, padding": {"k": 512, "n": 64, "group_size": 32, "bits": 8, "dead": True},
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_every_format(runtime: ModuleType, case: dict[str, Any], dtype: torch.dtype) -> None:
    tensors = shard(**case)
    kind = case.get("bits", 4), case.get("checkpoint_format", "gptq")
    linear = runtime.QuantLinear(tensors, *kind)
    layer = runtime.arrange([tensors], *kind)
    for tokens in (1, 17):
        x = torch.randn(tokens, case["k"], device=DEVICE).to(dtype)
        check(runtime.multiply(x, layer), x, linear)
        exact = linear(x.double())
        torch.testing.assert_close(layer.reference(x.double()), exact, rtol=1e-12, atol=1e-12)
        check(runtime.multiply_expanded(x, layer), x, linear)
    assert not layer.counters.any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 2, 3, 16, 17, 63, 100])
@pytest.mark.parametrize("group_size", [128, 32, 16, 8])
def test_every_number_of_tokens(
    runtime: ModuleType, group_size: int, tokens: int, dtype: torch.dtype
) -> None:
    tensors = shard(768, 320, group_size)
    layer = runtime.arrange([tensors])
    x = torch.randn(tokens, 768, device=DEVICE).to(dtype)
    check(runtime.multiply(x, layer), x, runtime.QuantLinear(tensors))


@pytest.mark.parametrize("fold", [False, True])
@pytest.mark.parametrize("splits", [1, 2, 3])
@pytest.mark.parametrize(
    ("group_size", "sizes"),
    [
        *[(128, sizes) for sizes in ((1, 64, 64), (16, 64, 32), (32, 128, 64), (128, 128, 16))],
        *[(16, sizes) for sizes in ((1, 128, 32), (1, 64, 16), (16, 64, 16), (128, 128, 64))],
    ],
)
def test_every_launch_gives_the_same(
    runtime: ModuleType, group_size: int, sizes: tuple[int, int, int], splits: int, fold: bool
) -> None:
    tensors = shard(1536, 256, group_size)
    layer = runtime.arrange([tensors])
    launch = runtime.Launch(*sizes, fold, 3, 4, splits)
    for tokens in (1,) if sizes[0] == 1 else (5, 40):
        x = torch.randn(tokens, 1536, device=DEVICE).half()
        out = runtime.multiply_packed(x, layer, launch)
        check(out, x, runtime.QuantLinear(tensors))
        assert torch.equal(out, runtime.multiply_packed(x, layer, launch))
    assert not layer.counters.any()


def test_rows_that_only_fill_up_groups_are_left_out(runtime: ModuleType) -> None:
    tensors = shard(2048, 64, 32)
    values = unpack_rows(tensors["qweight"], 4)
    live = torch.arange(2048, device=DEVICE) % 32 < 13
    values[~live] = 8
    values[96:128] = 8  # all of a group
    tensors["qweight"] = pack_rows(values, 4)
    linear, layer = runtime.QuantLinear(tensors), runtime.arrange([tensors])
    assert layer.rows == 1024  # 63 groups of 16, up to whole tiles of 128
    assert layer.packed.numel() * 4 == 1024 * 64
    for tokens in (1, 16, 40):
        x = torch.randn(tokens, 2048, device=DEVICE).half()
        check(runtime.multiply(x, layer), x, linear)
    values[:] = 8
    tensors["qweight"] = pack_rows(values, 4)
    layer = runtime.arrange([tensors])
    assert not runtime.multiply(torch.randn(1, 2048, device=DEVICE).half(), layer).any()


def test_inputs_of_any_shape(runtime: ModuleType) -> None:
    tensors = shard(256, 128, 64)
    linear, layer = runtime.QuantLinear(tensors), runtime.arrange([tensors])
    whole = torch.randn(4, 6, 512, device=DEVICE).half()
    for x in (whole[..., :256], whole[1:3, ::2, 128:384], whole[..., ::2], whole[:, 0, :256]):
        check(runtime.multiply(x, layer), x, linear)
    check(runtime.multiply(whole[0, 0, :256], layer), whole[0, 0, :256], linear)
    assert runtime.multiply(whole[:0, 0, :256], layer).shape == (0, 128)
    exact = linear(whole[0, :, :256].float())
    torch.testing.assert_close(runtime.multiply(whole[0, :, :256].float(), layer), exact)


@pytest.mark.parametrize("tokens", [1, 16, 1024])
def test_inputs_that_lie_by_channel_and_sizes_that_fill_no_block(
    runtime: ModuleType, tokens: int
) -> None:
    tensors = shard(64, 72, 32)
    linear, layer = runtime.QuantLinear(tensors), runtime.arrange([tensors])
    x = torch.randn(64, tokens, device=DEVICE).half().T
    out = runtime.multiply(x, layer)
    check(out, x, linear)
    assert out.is_contiguous()  # or no ranks could sum it


@pytest.mark.parametrize("tokens", [1, 16, 1024])
@pytest.mark.parametrize("perm", [False, True])
def test_inputs_that_want_gradients_get_none(runtime: ModuleType, perm: bool, tokens: int) -> None:
    tensors = shard(64, 64, 32, perm=perm)
    x = torch.randn(tokens, 64, device=DEVICE).half().requires_grad_()
    out = runtime.multiply(x, runtime.arrange([tensors]))
    assert not out.requires_grad
    check(out, x.detach(), runtime.QuantLinear(tensors))


def test_what_a_token_is_fed_does_not_leak_into_another(runtime: ModuleType) -> None:
    layer = runtime.arrange([shard(256, 64, 32)])
    x = torch.randn(5, 256, device=DEVICE).half()
    x[3] = float("nan")
    out = runtime.multiply(x, layer)
    assert out[3].isnan().all()
    assert not out[[0, 1, 2, 4]].isnan().any()


def test_layers_of_one_input_run_as_one(runtime: ModuleType) -> None:
    parts = [shard(256, n, 64, bias=n != 64, seed=n) for n in (192, 64, 72)]
    for part in parts:
        part["perm"] = parts[0]["perm"]
    plain = [runtime.QuantLinear(part) for part in parts]
    fast = [runtime.QuantLinear(part) for part in parts]
    runtime.use_kernels(*fast)
    launches = []
    runtime.multiply, multiply = lambda *a: launches.append(a) or multiply(*a), runtime.multiply
    try:
        for tokens in (1, 3):
            x = torch.randn(2, tokens, 256, device=DEVICE).half()
            for one, other in zip(fast, plain, strict=True):
                check(one(x), x, other)
        assert len(launches) == 2
        x += 1
        check(fast[1](x), x, plain[1])
        check(fast[1](x), x, plain[1])
        x += 1  # the same tensor, other values
        check(fast[2](x), x, plain[2])
        assert len(launches) == 5
        with torch.inference_mode():
            check(fast[0](x), x, plain[0])
    finally:
        runtime.multiply = multiply
    assert not fast[0].tensors()


def test_tuning_keeps_the_fastest_launch(runtime: ModuleType, tmp_path: Path) -> None:
    layer = runtime.arrange([shard(1024, 256, 64)])
    choices = runtime.launches(16, layer)
    assert not choices.index(runtime.default_launch(16, layer))
    assert len(set(choices)) == len(choices) > 4
    times = iter([3.0, 2.0, 1.0, *[4.0] * len(choices)])
    path = tmp_path / "tuned.json"
    runtime.tune([layer, layer], [16], path=path, measure=lambda call: next(times))
    best = runtime._TUNED[runtime._key(16, layer)]
    assert best == choices[2]
    runtime._TUNED.clear()
    runtime.tune([], path=path)
    assert dict(runtime._TUNED) == {runtime._key(16, layer): best}
    x = torch.randn(9, 1024, device=DEVICE).half()  # of the same class as 16
    used = []
    packed, runtime.multiply_packed = runtime.multiply_packed, lambda *a: used.append(a)
    try:
        runtime.tune([layer], [9], measure=lambda call: call())
    finally:
        runtime.multiply_packed = packed
    assert not used
    torch.testing.assert_close(
        runtime.multiply(x, layer), packed(x, layer, best), rtol=0, atol=0, equal_nan=False
    )


@pytest.mark.parametrize("text", ["", "[]", '{"a": 1}', '{"a": [16, 64, 32, 1, 3, 4, 1]}'])
def test_a_damaged_file_of_launches_is_refused(
    runtime: ModuleType, tmp_path: Path, text: str
) -> None:
    path = tmp_path / "tuned.json"
    path.write_text(text)
    with pytest.raises(runtime.FormatError, match=r"tuned\.json: "):
        runtime.tune([], path=path)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("block_m", [64, 128, 256])
@pytest.mark.parametrize(
    "case",
    [
        {"k": 512, "n": 192, "group_size": 128},
        {"k": 4096, "n": 8192, "group_size": 128, "bias": True},
        {"k": 4096, "n": 8192, "group_size": 32, "dead": True, "sym": False},
        {"k": 448, "n": 256, "group_size": 448, "perm": False, "sym": False},
        {"k": 320, "n": 104, "group_size": 32, "perm": False, "bias": True},
        {"k": 768, "n": 128, "group_size": 192},
        {"k": 2048, "n": 512, "group_size": 16, "sym": False},
        {"k": 2048, "n": 256, "group_size": 8},
        {"k": 14336, "n": 1024, "group_size": 64, "perm": False},
    ],
    ids=str,
)
def test_many_tokens_on_hopper(
    runtime: ModuleType, case: dict[str, Any], block_m: int, dtype: torch.dtype
) -> None:
    tensors = shard(**case)
    linear, layer = runtime.QuantLinear(tensors), runtime.arrange([tensors])
    if not runtime._abilities(layer.packed.device).hopper:
        pytest.skip("not a Hopper GPU with a Triton that is known")
    for tokens in (1, 33, 100, 256, 300):
        x = torch.randn(tokens, case["k"], device=DEVICE).to(dtype)
        out = runtime.multiply_on_hopper(x, layer, block_m)
        check(out, x, linear)
        assert torch.equal(out, runtime.multiply_on_hopper(x, layer, block_m))
        assert not layer.counters.any()
    wide = torch.randn(40, case["k"] + 9, device=DEVICE).to(dtype)
    for x in (wide[:, 1:-8], wide[::2, : case["k"]]):  # not where the copy engine can begin
        check(runtime.multiply_on_hopper(x, layer, block_m), x, linear)


COMPILE = """
import itertools
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import compile
from triton.experimental.gluon._runtime import GluonASTSource
from triton.experimental.gluon.language import NVMMASharedLayout
from tpgptq_convert.tpgptq_runtime import _product_on_hopper as kernel

TILES = [(64, 128, 64, 2, 4), (128, 64, 64, 1, 4), (256, 128, 64, 1, 8), (256, 128, 32, 2, 8)]
GROUPS = {64: (128, 2), 32: (16, 4)}  # group size, and groups in a word
KINDS = [("fp16", True), ("bf16", False)]
for (m, n, stored, rings, warps), (dtype, sym) in itertools.product(TILES, KINDS):
    layout = repr(NVMMASharedLayout(2 * stored, 16, 2))
    types = {
        "tokens": f"tensordesc<{dtype}[{m}, {stored}],{layout}>",
        "words": f"tensordesc<i16[64, {stored}],{layout}>",
        **dict.fromkeys(["scales", "zeros"], "*fp16"),
        **dict.fromkeys(["bias", "out"], "*" + dtype),
        **{"partial": "*fp32", "flags": "*i32"},
        **dict.fromkeys(["M", "N", "columns", "tiles"], "i32"),
    }
    size, width = GROUPS[stored]
    known = dict(HAS_BIAS=True, GS=size, SYM=sym, STORED=stored, WIDTH=width)
    known |= dict(BLOCK_M=m, BLOCK_N=n, RINGS=rings, WARPS=warps)
    source = GluonASTSource(
        kernel,
        types | dict.fromkeys(known, "constexpr"),
        {(kernel.arg_names.index(name),): value for name, value in known.items()},
        {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in list(types)[2:11]},
    )
    done = compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps})
    assert done.asm["ptx"].count("wgmma.mma_async") == 4 * stored // 16 * n // (16 * warps)
    assert done.metadata.shared <= 227 << 10
"""


# Every way to multiply, twice: the first launch is Triton's, the second goes past it.
LAUNCH = """
import torch, triton
from triton.backends.compiler import GPUTarget
from tpgptq_convert import tpgptq_runtime as runtime

calls = []

class Launcher:
    def __init__(self, source, metadata):
        self.name = metadata.name

    def __call__(self, *arguments):  # the grid, the stream, four of Triton's, and the kernel's own
        kinds = [a if type(a) in (int, bool) else type(a) for a in arguments[9:]]
        calls.append((self.name, arguments[:3], kinds))

class Utils:
    get_device_properties = staticmethod(lambda device: {"max_shared_mem": 227 << 10})
    load_binary = staticmethod(lambda *arguments: (0, 0, 0, 0, 1024))

class Driver:
    utils, launcher_cls = Utils, Launcher
    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda device: 0)
    get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))

triton.runtime.driver.set_active(Driver())
runtime.kernels_run_on = lambda device: True
runtime._abilities = lambda device: runtime._Abilities(132, True, True, True)
names = set()
kinds = (4, torch.float16, True), (4, torch.bfloat16, False), (8, torch.float16, True)
for bits, dtype, perm in kinds:
    tensors = {
        "qweight": torch.zeros(1024 * bits // 32, 192, dtype=torch.int32),
        "qzeros": torch.zeros(8, 192 * bits // 32, dtype=torch.int32),
        "scales": torch.zeros(8, 192, dtype=torch.float16),
    }
    layer = runtime.arrange([tensors | ({"perm": torch.arange(1024)} if perm else {})], bits)
    for tokens in (1, 9, 40, 100, 2500):
        x = torch.zeros(tokens, 1024, dtype=dtype)
        found = []
        for _ in range(2):
            calls.clear()
            runtime.multiply(x, layer)
            found.append(list(calls))
        assert found[0] == found[1] != []
        names |= {name for name, *_ in calls}
assert names == {"_product", "_product_on_hopper", "_expand", "_gather"}, names
"""


@pytest.mark.parametrize("code", [COMPILE, LAUNCH])
def test_what_only_a_gpu_runs_compiles(code: str) -> None:
    """Here there may be no GPU, and no interpreter runs Gluon, nor does it mind types."""
    plain = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=plain, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.gpu
def test_calls_can_be_captured_in_a_graph(runtime: ModuleType) -> None:
    tensors = shard(4096, 1024, 128)
    linear, layer = runtime.QuantLinear(tensors), runtime.arrange([tensors])
    for tokens in (1, 16, 300):
        x = torch.randn(tokens, 4096, device=DEVICE).half()
        runtime.multiply(x, layer)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = runtime.multiply(x, layer)
        for _ in range(3):
            x.normal_()
            out.fill_(float("nan"))
            graph.replay()
            check(out, x, linear)
