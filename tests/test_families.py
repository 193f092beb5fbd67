"""Every family of the table: a small model of its transformers class, packed by our own packer.

Each linear layer inside a block is given random integers, and its dequantised weight to the
transformers model; the model's float32 logits are what the ranks' must be.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import test_oracle
import torch
from click.testing import Result
from factories import dequantise, edit_tensors, edit_text, make_g_idx, make_layer, refresh_checksums
from ranks import run_ranks
from remote import modeling_own
from remote.modeling_own import LAYOUTS, OwnConfig, OwnForCausalLM
from safetensors.torch import save_file
from torch import nn
from transformers import CONFIG_MAPPING

from tpgptq_convert.families import FAMILIES, family_of
from tpgptq_convert.packing import pack_cols, unpack_cols
from tpgptq_convert.tpgptq_runtime import FormatError, load_model

Run = Callable[..., Result]
SIZES = {
    **{"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2, "vocab_size": 96},
    **{"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 16},
    **{"max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
}
LATENT = {  # no two axes are alike, and the latents' last groups are short
    **{"q_lora_rank": 112, "kv_lora_rank": 80, "num_key_value_heads": 8},
    **{"qk_nope_head_dim": 24, "qk_rope_head_dim": 8, "v_head_dim": 16, "head_dim": 8},
    **{"n_routed_experts": 4, "n_shared_experts": 3, "moe_intermediate_size": 96},
    **{"num_experts_per_tok": 2, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1},
}
# What differs from SIZES, or is worth having beside them.
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "gemma3_text": {"sliding_window": 8},
    "seed_oss": {"attention_bias": True, "attention_out_bias": True},
    "ernie4_5": {"use_bias": True},
    "helium": {"head_dim": 8, "attention_bias": True},
    "exaone4": {"sliding_window": 8, "sliding_window_pattern": 2},
    "stablelm": {"head_dim": 8, "use_qkv_bias": True},
    "opt": {"ffn_dim": 160, "word_embed_proj_dim": 64},
    "gptj": {"rotary_dim": 8},
    "codegen": {"rotary_dim": 8},
    "persimmon": {"head_dim": 8},
    "falcon": {"new_decoder_architecture": True, "num_kv_heads": 4},
    "olmo2": {"attention_bias": True},
    "olmo3": {"sliding_window": 8},
    "olmoe": {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "clip_qkv": 0.5},
    "deepseek_v2": LATENT,
    "deepseek_v3": {**LATENT, "attention_bias": True},
    "internlm": {"num_key_value_heads": 8},
    "baichuan": {"num_key_value_heads": 8, "head_dim": 8},
    "qwen": {"num_key_value_heads": 8, "head_dim": 8, "intermediate_size": 320},
    "exaone": {"num_layers": 2},
    "chatglm": {
        **{"num_layers": 2, "multi_query_group_num": 4, "ffn_hidden_size": 160},
        **{"kv_channels": 16, "add_qkv_bias": True},
    },
    "mixtral": {"num_local_experts": 4},
    "qwen2_moe": {
        **{"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 96},
        "shared_expert_intermediate_size": 224,
    },
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 96},
}
# Other forms that a family has.
FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt_neox-20b's activation": ("gpt_neox", {"hidden_act": "gelu_fast"}),
    "gpt_bigcode, kv heads of its own": ("gpt_bigcode", {"multi_query": False}),
    "falcon, one norm for groups of heads": (
        "falcon",
        {**CONFIGS["falcon"], "num_ln_in_parallel_attn": 1},
    ),
    "falcon, one kv head": ("falcon", {"ffn_hidden_size": 160}),
    "falcon, kv heads of its own": ("falcon", {"multi_query": False, "bias": True}),
    "falcon, ALiBi, the MLP with a norm of its own": (
        "falcon",
        {"multi_query": False, "bias": True, "alibi": True, "parallel_attn": False},
    ),
    "deepseek_v2, queries without a latent": ("deepseek_v2", {**LATENT, "q_lora_rank": None}),
    "deepseek_v3, queries without a latent": ("deepseek_v3", {**LATENT, "q_lora_rank": None}),
    "deepseek_v3, experts in no block": ("deepseek_v3", {**LATENT, "first_k_dense_replace": 2}),
    "qwen2_moe, one block with experts": (
        "qwen2_moe",
        {**CONFIGS["qwen2_moe"], "mlp_only_layers": [1], "qkv_bias": False},
    ),
    "qwen3_moe, one block with experts": (
        "qwen3_moe",
        {**CONFIGS["qwen3_moe"], "decoder_sparse_step": 2},
    ),
}
CASES = {name: (name, CONFIGS.get(name, {})) for name in FAMILIES} | FORMS
# Families of LAYOUTS that newer versions of transformers have a class for.
NATIVE = ("exaone",)
NATIVE_CASES = [
    pytest.param(
        *(CASES[name], True),
        id=f"{name}, transformers' class",
        marks=pytest.mark.skipif(name not in CONFIG_MAPPING, reason=f"transformers has no {name}"),
    )
    for name in NATIVE
]
AUTO_MAP = {
    "AutoConfig": "modeling_own.OwnConfig",
    "AutoModelForCausalLM": "modeling_own.OwnForCausalLM",
}
# How SIZES are called where they have names of their own.
SHORT = {
    **{"hidden_size": "n_embd", "num_hidden_layers": "n_layer", "intermediate_size": "n_inner"},
    **{"num_attention_heads": "n_head", "max_position_embeddings": "n_positions"},
}
PAIR = ("gate", "up")
DENSE = ("shared_expert_gate",)  # what no one quantises
# What released checkpoints call a module that transformers 5 has renamed.
OLD_NAMES = {
    "mixtral": {"mlp": "block_sparse_moe", "gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"},
    "exaone": {
        **{"model": "transformer", "embed_tokens": "wte", "layers": "h", "norm": "ln_f"},
        **{"input_layernorm": "ln_1", "post_attention_layernorm": "ln_2"},
        **{"self_attn": "attn.attention", "o_proj": "out_proj"},
        **{"gate_proj": "c_fc_0", "up_proj": "c_fc_1", "down_proj": "c_proj"},
    },
}
MPT = {"hidden_size": "d_model", "num_hidden_layers": "n_layers", "num_attention_heads": "n_heads"}
NAMES = {
    "gptj": SHORT,
    "codegen": SHORT,
    "gpt2": SHORT,
    "gpt_bigcode": SHORT,
    "bloom": SHORT,
    "mpt": MPT,
}
TOKENS = [[5, 60, 30, 41, 7, 93, 12, 11, 70, 22, 8, 3]]


README = Path(__file__).parent.parent / "README.md"


def table() -> str:
    """What the README says of the families: each cell is a case of the tests, here or there."""
    head = "model_type | fused layers | convert | verify | logits, tp 2 | logits, tp 4 | packed by"
    rows = [
        f"`{name}` | {' '.join(f'`{x.name}`' for x in family.linears if x.fused)} "
        f"| yes | yes | equal | equal | {'auto-gptq, ' * (name in test_oracle.CASES)}our packer"
        f"{', a class of our own' * (name in LAYOUTS)}{', one of transformers' * (name in NATIVE)}"
        for name, family in FAMILIES.items()
    ]
    lines = [head, "|".join([" --- "] * 7), *rows]
    return "".join(f"| {line.strip()} |\n" for line in lines)


def test_the_readme_lists_every_family() -> None:
    assert table() in README.read_text()


def build(
    directory: Path, model_type: str, more: Mapping[str, Any], native: bool = False
) -> nn.Module:
    """Write a checkpoint and return the float32 model that it stands for.

    native: of transformers' class, where there is one of our own too.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    names = NAMES.get(model_type, {})
    sizes = {names.get(name, name): size for name, size in SIZES.items()}
    if model_type == "falcon":
        del sizes["head_dim"]  # can't be said
    own = model_type in LAYOUTS and not native
    if own:
        config = OwnConfig(**sizes | more, family=model_type, tie_word_embeddings=False)
        model = OwnForCausalLM(config).float().eval()
    else:
        config = AutoConfig.for_model(model_type, **sizes | more)
        model = AutoModelForCausalLM.from_config(config).float().eval()
    for parameter in model.parameters():  # biases and norms are all alike otherwise
        parameter.data += torch.randn_like(parameter) * 0.1
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        del state["lm_head.weight"]
    elif FAMILIES[model_type].head not in state:  # its name before transformers 5
        state[FAMILIES[model_type].head] = state.pop("lm_head.weight")
    prefix = FAMILIES[model_type].prefix
    old = {} if own else OLD_NAMES.get(model_type, {})
    count = 0

    def released(name: str) -> str:
        return ".".join(old.get(word, word) for word in name.split("."))

    def quantised(name: str, k: int, n: int) -> torch.Tensor:
        """The weight (K, N) of a new layer."""
        nonlocal state, count
        g_idx = make_g_idx(rng, k, 32)
        layer = make_layer(rng, k, n, g_idx)
        state |= {f"{released(name)}.{part}": tensor for part, tensor in layer.items()}
        count += 1
        return dequantise(layer, g_idx).float()

    for name, module in model.named_modules():
        if not released(name).startswith(f"{prefix}.") or name.endswith(DENSE):
            continue
        if hasattr(module, "gate_up_proj") and hasattr(module, "num_experts"):
            for index, (rows, down) in enumerate(
                zip(module.gate_up_proj, module.down_proj, strict=True)
            ):
                n, k = rows.shape
                gate, up = (quantised(f"{name}.{index}.{x}_proj", k, n // 2) for x in PAIR)
                rows.data[:] = torch.cat((gate.T, up.T))
                down.data[:] = quantised(f"{name}.{index}.down_proj", n // 2, k).T
            del state[f"{name}.gate_up_proj"], state[f"{name}.down_proj"]
        conv = type(module).__name__ == "Conv1D"  # gpt2's, (K, N)
        if conv or isinstance(module, nn.Linear):
            weight = quantised(name, *(module.weight.shape if conv else module.weight.T.shape))
            module.weight.data = weight if conv else weight.T
            del state[f"{name}.weight"]
    state = {released(name): tensor for name, tensor in state.items()}
    text = json.loads(config.to_json_string(use_diff=False))
    if native:
        text |= {name: text.pop(key) for name, key in config.attribute_map.items()}  # released
    if model_type in LAYOUTS:
        text |= {"model_type": model_type, "auto_map": AUTO_MAP}
    family = family_of(text)
    blocks = range(SIZES["num_hidden_layers"])
    assert count == sum(len(family.linears_of(text, family.geometry(text), i)) for i in blocks)
    directory.mkdir()
    if own:
        shutil.copy(modeling_own.__file__, directory)
    save_file(
        {name: tensor.contiguous() for name, tensor in state.items()},
        directory / "model.safetensors",
    )
    quantization = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": True}
    (directory / "config.json").write_text(json.dumps(text | {"quantization_config": quantization}))
    return model


@pytest.mark.parametrize("tp", [2, 3, 4])
@pytest.mark.parametrize(
    ("case", "native"),
    [*(pytest.param(case, False, id=name) for name, case in CASES.items()), *NATIVE_CASES],
)
def test_the_logits_of_the_ranks_are_the_models(
    tpgptq: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    case: tuple[str, Mapping[str, Any]],
    native: bool,
    tp: int,
) -> None:
    model = build(tmp_path / "model", *case, native)
    done = tpgptq("convert", "--tp", tp, tmp_path / "model", tmp_path / "out")  # and verify
    assert done.exit_code == 0, done.output
    tokens = torch.tensor(TOKENS)
    with torch.inference_mode():
        expected = model(tokens).logits
    answers, sums = run_ranks(
        tmp_path / "out",
        tp,
        lambda rank: rank(tokens).logits,
        monkeypatch,
        trust_remote_code=case[0] in LAYOUTS and not native,
    )
    scale = float(expected.abs().max())
    assert scale > 0.1
    for answer in answers:
        torch.testing.assert_close(answer, expected, rtol=0, atol=1e-5 * scale)
    # Two more where queries and keys have a norm over all heads.
    assert sums == (4 if case[0] in ("olmo2", "olmo3", "olmoe") else 2) * SIZES["num_hidden_layers"]


@pytest.mark.parametrize("model_type", ["gpt_neox", "phi"])
def test_a_quantised_head_under_its_own_name_and_with_a_bias(
    tpgptq: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model_type: str
) -> None:
    model = build(tmp_path / "model", model_type, {})
    rng, head = np.random.default_rng(1), FAMILIES[model_type].head.removesuffix(".weight")
    g_idx = make_g_idx(rng, 64, 32)
    layer = make_layer(rng, 64, 96, g_idx)
    model.get_output_embeddings().weight.data = dequantise(layer, g_idx).float().T

    def quantise(tensors: dict[str, torch.Tensor]) -> None:
        del tensors[f"{head}.weight"]
        tensors.update({f"{head}.{part}": tensor for part, tensor in layer.items()})

    edit_tensors(tmp_path / "model" / "model.safetensors", quantise)
    done = tpgptq("convert", "--tp", 2, tmp_path / "model", tmp_path / "out")
    assert done.exit_code == 0, done.output
    tokens = torch.tensor(TOKENS)
    with torch.inference_mode():
        expected = model(tokens).logits
    answers, _ = run_ranks(tmp_path / "out", 2, lambda rank: rank(tokens).logits, monkeypatch)
    for answer in answers:
        scale = float(expected.abs().max())
        torch.testing.assert_close(answer, expected, rtol=0, atol=1e-5 * scale)


def swap_columns(tensors: dict[str, torch.Tensor], module: str, one: int, other: int) -> None:
    """Two columns of a layer, eight apart at least, with all that belongs to them."""
    order = torch.arange(tensors[f"{module}.scales"].shape[1])
    order[one], order[other] = other, one
    zeros = unpack_cols(tensors[f"{module}.qzeros"], 4)[:, order]
    tensors[f"{module}.qzeros"] = pack_cols(zeros, 4)
    for part in ("qweight", "scales", "bias"):
        if f"{module}.{part}" in tensors:
            tensors[f"{module}.{part}"] = tensors[f"{module}.{part}"][..., order].contiguous()


@pytest.mark.parametrize("with_index", [True, False], ids=["exact", "functional"])
@pytest.mark.parametrize(
    ("model_type", "module"),
    [
        ("phi3", "model.layers.1.self_attn.qkv_proj"),
        ("phi3", "model.layers.1.mlp.gate_up_proj"),
        ("gpt_bigcode", "transformer.h.1.attn.c_attn"),
        ("gpt_neox", "gpt_neox.layers.1.attention.query_key_value"),
        ("codegen", "transformer.h.1.attn.qkv_proj"),
        ("deepseek_v2", "model.layers.1.self_attn.q_a_proj"),
        ("deepseek_v2", "model.layers.1.self_attn.kv_a_proj_with_mqa"),
        ("deepseek_v2", "model.layers.1.self_attn.kv_b_proj"),
    ],
)
def test_verify_finds_swapped_columns_of_fused_layers(
    tpgptq: Run, tmp_path: Path, model_type: str, module: str, with_index: bool
) -> None:
    build(tmp_path / "model", model_type, CONFIGS.get(model_type, {}))
    out = tmp_path / "out"
    assert tpgptq("convert", "--tp", 2, tmp_path / "model", out).exit_code == 0
    part = out / "model-rank-1-part-0.safetensors"
    columns = 0

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        nonlocal columns
        columns = tensors[f"{module}.scales"].shape[1]
        swap_columns(tensors, module, 3, columns - 5)  # of the first part and of the last

    edit_tensors(part, edit)
    if not with_index:
        (out / "tpgptq-index.safetensors").unlink()
    refresh_checksums(out)
    result = tpgptq("verify", tmp_path / "model", out)
    assert result.exit_code == 3
    if with_index:
        assert f"{module}: rank 1: qweight holds values that differ" in result.stderr


def test_empty_heads_that_config_json_cannot_count_are_not_merged(
    tpgptq: Run, tmp_path: Path
) -> None:
    build(tmp_path / "model", "opt", CONFIGS["opt"])
    command = ("convert", "--layout", "merged", tmp_path / "model", tmp_path / "out")
    result = tpgptq(*command, "--tp", 3)
    assert result.exit_code == 1
    assert (
        "--layout merged: tp 3 needs empty heads, which this layout can't have with opt"
        in result.stderr
    )
    assert tpgptq(*command, "--tp", 2).exit_code == 0


@pytest.mark.parametrize(
    ("model_type", "key", "name"),
    [
        ("cohere", "use_qk_norm", "q_norm.weight"),
        ("stablelm", "qk_layernorm", "q_layernorm.norms.0.weight"),
    ],
)
def test_norms_of_each_head_are_refused(
    tpgptq: Run, tmp_path: Path, model_type: str, key: str, name: str
) -> None:
    build(tmp_path / "model", model_type, {**CONFIGS.get(model_type, {}), key: True})
    result = tpgptq("inspect", tmp_path / "model")
    assert result.exit_code == 1
    assert f"model.layers.0.self_attn.{name}: unknown" in result.stderr


@pytest.mark.parametrize(
    ("model_type", "key", "value", "words"),
    [
        ("qwen2_moe", "decoder_sparse_step", "two", "is 'two'; must be an integer from 0"),
        ("qwen2_moe", "mlp_only_layers", 5, "is 5; must be a list of blocks"),
        ("deepseek_v2", "first_k_dense_replace", -1, "is -1; must be an integer from 0"),
        ("deepseek_v2", "moe_layer_freq", 2, "is 2; must be 1, as transformers takes it"),
        ("deepseek_v2", "kv_lora_rank", None, "is None; must be a positive integer"),
        ("deepseek_v2", "n_shared_experts", 0, "is 0; must be a positive integer"),
        ("deepseek_v2", "v_head_dim", "24", "is '24'; must be a positive integer"),
    ],
)
def test_configs_that_misstate_experts_and_latents(
    tpgptq: Run, tmp_path: Path, model_type: str, key: str, value: object, words: str
) -> None:
    build(tmp_path / "model", model_type, CONFIGS[model_type])
    path = tmp_path / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    result = tpgptq("inspect", tmp_path / "model")
    assert result.exit_code == 1
    assert f"config.json: {key} {words}" in result.stderr


@pytest.mark.parametrize(
    ("model_type", "names"),
    [
        ("bloom", {"hidden_size": "n_embed", "n_head": "num_attention_heads"}),  # bloom-7b1
        ("gpt2", {"n_embd": "hidden_size", "n_layer": "num_hidden_layers"}),
        ("qwen3_moe", {"num_experts": "num_local_experts"}),
    ],
)
def test_keys_have_the_names_that_transformers_takes_for_them(
    tpgptq: Run, tmp_path: Path, model_type: str, names: Mapping[str, str]
) -> None:
    build(tmp_path / "model", model_type, CONFIGS.get(model_type, {}))
    path = tmp_path / "model" / "config.json"
    config = json.loads(path.read_text())
    before = tpgptq("inspect", tmp_path / "model").stdout
    for name, other in names.items():
        value = config.pop(other, None)
        config[other] = config.pop(name, value)
    path.write_text(json.dumps(config))
    after = tpgptq("inspect", tmp_path / "model")
    assert (after.exit_code, after.stdout) == (0, before)


def test_a_block_that_predicts_further_tokens_is_refused_in_one_line(
    tpgptq: Run, tmp_path: Path
) -> None:
    build(tmp_path / "model", "deepseek_v3", LATENT)

    def add(tensors: dict[str, torch.Tensor]) -> None:
        last = {name for name in tensors if name.startswith("model.layers.1.")}
        for name in last:
            tensors[name.replace(".1.", ".2.", 1)] = tensors[name].clone()
        tensors["model.layers.2.eh_proj.weight"] = torch.ones(64, 128)
        tensors["model.layers.x"] = torch.ones(1)

    edit_tensors(tmp_path / "model" / "model.safetensors", add)
    result = tpgptq("inspect", tmp_path / "model")
    assert result.exit_code == 1
    block, other = result.stderr.split("Error: ")[1:]
    assert block.startswith("model.layers.2: unknown (tensors: ")
    assert "must be one of the 2 blocks that config.json counts" in block
    assert other.startswith("model.layers.x: unknown")


def test_inspect_tells_layers_of_one_name_apart(tpgptq: Run, tmp_path: Path) -> None:
    build(tmp_path / "model", "deepseek_v2", LATENT)
    lines = tpgptq("inspect", "--tp", 2, tmp_path / "model").stdout.splitlines()
    (head,) = (line for line in lines if line.startswith("tp "))
    places = ("mlp", "mlp.experts.*", "mlp.shared_experts")
    for name in ("o_proj", *(f"{place}.down_proj" for place in places)):
        assert f"  {name} rows" in head
    for place in places:
        pair = f"{place}.gate_proj, {place}.up_proj share one g_idx"
        assert [line.startswith(pair) for line in lines].count(True) == 1
    assert "q_a_proj, kv_a_proj_with_mqa share one g_idx in 0 of 2 blocks." in lines


def test_layers_that_are_one_share_with_none(tpgptq: Run, tmp_path: Path) -> None:
    build(tmp_path / "model", "phi3", {})
    assert "share one g_idx" not in tpgptq("inspect", tmp_path / "model").stdout


def test_the_code_of_a_model_runs_only_where_it_is_trusted(tpgptq: Run, tmp_path: Path) -> None:
    build(tmp_path / "model", "internlm2", {})
    out = tmp_path / "out"
    assert tpgptq("convert", "--tp", 1, tmp_path / "model", out).exit_code == 0
    code = out / "modeling_own.py"
    code.write_text("raise SystemExit('it ran')\n")
    with pytest.raises(FormatError, match=r"no model_type 'internlm2'.*trust_remote_code"):
        load_model(out)
    with pytest.raises(SystemExit, match="it ran"):
        load_model(out, trust_remote_code=True)


def test_trusted_code_runs_also_where_transformers_has_a_class(tpgptq: Run, tmp_path: Path) -> None:
    build(tmp_path / "model", "llama", {})
    path = tmp_path / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"auto_map": AUTO_MAP}))
    (tmp_path / "model" / "modeling_own.py").write_text("raise SystemExit('it ran')\n")
    out = tmp_path / "out"
    assert tpgptq("convert", "--tp", 1, tmp_path / "model", out).exit_code == 0
    assert type(load_model(out)).__name__ == "LlamaForCausalLM"
    with pytest.raises(SystemExit, match="it ran"):
        load_model(out, trust_remote_code=True)


def test_heads_that_lie_in_quarters_come_in_fours(tpgptq: Run, tmp_path: Path) -> None:
    build(tmp_path / "model", "codegen", CONFIGS["codegen"])
    edit_text(tmp_path / "model" / "config.json", '"n_head": 8', '"n_head": 6')
    result = tpgptq("inspect", tmp_path / "model")
    assert result.exit_code == 1
    assert "config.json: n_head is 6; must be a multiple of 4" in result.stderr


def test_fused_layers_are_not_merged(tpgptq: Run, tmp_path: Path) -> None:
    build(tmp_path / "model", "phi3", {})
    for more in ((), ("--dry-run",)):
        result = tpgptq(
            "convert", "--tp", 2, "--layout", "merged", *more, tmp_path / "model", tmp_path / "out"
        )
        assert result.exit_code == 1
        assert "--layout merged: self_attn.qkv_proj and mlp.gate_up_proj of phi3" in result.stderr
        assert not (tmp_path / "out").exists()


if __name__ == "__main__":
    sys.stdout.write(table())
