"""The attention layers that the benchmarks measure, and their inputs."""

from __future__ import annotations

import torch

from hf_effattn import LinearConfig, SparseConfig
from hf_effattn.attention import HeadGeometry, make_mechanism

HEADS = HeadGeometry(num_heads=9, num_kv_heads=3, head_dim=64, value_dim=64)  # SmolLM2-135M
SCALE = HEADS.head_dim**-0.5
CONFIGS = {
    "linear elu": LinearConfig(feature_map="elu", window=0, num_sinks=0),
    "linear hedgehog": LinearConfig(feature_map="hedgehog", window=0, num_sinks=0),
    "linear default": LinearConfig(),
    "streaming 256+4": SparseConfig(window=256, num_sinks=4),
    "streaming 1024+4": SparseConfig(window=1024, num_sinks=4),
}


def inputs(length: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """Random query, key and value in the layout of a projection, `[B, T, H, D]` seen as `[B, H, T, D]`."""
    generator = torch.Generator().manual_seed(0)
    numbers = (HEADS.num_heads, HEADS.num_kv_heads, HEADS.num_kv_heads)
    return [torch.randn(1, length, n, HEADS.head_dim, generator=generator).to(dtype).transpose(1, 2) for n in numbers]


def mechanism(name: str, dtype: torch.dtype) -> torch.nn.Module:
    return make_mechanism(CONFIGS[name], HEADS).to(dtype).eval()
