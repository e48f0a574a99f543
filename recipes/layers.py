"""The attention layers that the benchmarks measure, and their inputs."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from hf_effattn import LinearConfig, SparseConfig
from hf_effattn.attention import HeadGeometry, make_mechanism

SHAPES = {
    "smollm2-135m": HeadGeometry(num_heads=9, num_kv_heads=3, head_dim=64, value_dim=64),
    "llama-3-8b": HeadGeometry(num_heads=32, num_kv_heads=8, head_dim=128, value_dim=128),
}
CONFIGS = {
    "linear elu": LinearConfig(feature_map="elu", window=0),
    "linear hedgehog": LinearConfig(feature_map="hedgehog", window=0),
    "linear default": LinearConfig(),
    "streaming 256+4": SparseConfig(window=256, num_sinks=4),
    "streaming 1024+4": SparseConfig(window=1024, num_sinks=4),
    "strided 128": SparseConfig(pattern="strided", stride=128),
    "fixed 128+8": SparseConfig(pattern="fixed", stride=128),
    "bigbird 64+3": SparseConfig(pattern="bigbird"),
}
TRITON = {  # measured on CUDA devices only
    "linear elu, triton": LinearConfig(feature_map="elu", window=0, backend="triton"),
    "linear hedgehog, triton": LinearConfig(feature_map="hedgehog", window=0, backend="triton"),
}
FLEX = {f"{name}, flex": replace(x, backend="flex") for name, x in CONFIGS.items() if isinstance(x, SparseConfig)}
DECODED = {"moba 16 of 64": SparseConfig(selector="moba")}  # measured in decoding only
DRAFTED = {"quest 64 of 16": SparseConfig(selector="quest")}  # measured in drafts only


@dataclass(frozen=True)
class Bench:
    """Where and in what shape layers are measured.

    Args:
        shape: Name of the heads, one of `SHAPES`.
        dtype: Of queries, keys, values and parameters.
        device: "cpu" or "cuda".
    """

    shape: str = "smollm2-135m"
    dtype: torch.dtype = torch.float32
    device: str = "cpu"

    @property
    def heads(self) -> HeadGeometry:
        return SHAPES[self.shape]

    @property
    def groups(self) -> int:
        return self.heads.num_heads // self.heads.num_kv_heads

    @property
    def scale(self) -> float:
        return self.heads.head_dim**-0.5

    @property
    def names(self) -> list[str]:
        """Names of the layers that are measured in prefill, decoding and training."""
        return [*CONFIGS, *TRITON, *FLEX] if self.device.startswith("cuda") else [*CONFIGS]

    def inputs(self, length: int) -> list[torch.Tensor]:
        """Random query, key and value in the layout of a projection, `[B, T, H, D]` seen as `[B, H, T, D]`."""
        generator = torch.Generator().manual_seed(0)
        numbers = (self.heads.num_heads, self.heads.num_kv_heads, self.heads.num_kv_heads)
        made = [torch.randn(1, length, n, self.heads.head_dim, generator=generator) for n in numbers]
        return [x.to(self.device, self.dtype).transpose(1, 2) for x in made]

    def mechanism(self, name: str) -> torch.nn.Module:
        config = (CONFIGS | TRITON | FLEX | DECODED | DRAFTED)[name]
        return make_mechanism(config, self.heads).to(self.device, self.dtype).eval()

    def chunk_flops(self, features: int, chunk: int) -> int:
        """Floating-point operations a token of linear attention in chunks, its products within a chunk in full."""
        h = self.heads
        within, across = chunk * (features + h.value_dim), features * h.value_dim
        return 2 * (h.num_heads * (within + across) + h.num_kv_heads * across)
