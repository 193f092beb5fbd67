"""Rewrite desc_act GPTQ checkpoints into tensor-parallel shards with plain groups."""
