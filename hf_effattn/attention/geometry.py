"""How many heads a layer has, and of what size."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class HeadGeometry:
    """Number of query heads H, of key/value heads G, the head dimensions of queries and keys, D, and values, V, and the
    size of the layer's input, for mechanisms that read it."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    value_dim: int
    hidden_size: int | None = None

    def softmax_flops(self, num_keys: int) -> int:
        """Return the floating-point operations of one query's softmax attention over `num_keys` keys."""
        return 2 * self.num_heads * (self.head_dim + self.value_dim) * num_keys

    def check(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
        """Raise a ValueError unless the layer's tensors are of this geometry."""
        given = (query.shape[1], key.shape[1], key.shape[3], value.shape[3])
        expected = (self.num_heads, self.num_kv_heads, self.head_dim, self.value_dim)
        if given != expected or query.shape[3] != key.shape[3]:
            raise ValueError(f"the layer was converted for H, G, D, V = {expected}, but attends with {given}")

    def part(self, number: int) -> HeadGeometry:
        """Return one of so many equal parts of the heads.

        Raises:
            ValueError: if key/value heads cannot be divided by the number.
        """
        if self.num_kv_heads % number:
            raise ValueError(
                f"{self.num_kv_heads} key/value heads cannot be shared out over {number} processes of tensor "
                "parallelism; take a divisor"
            )
        return replace(self, num_heads=self.num_heads // number, num_kv_heads=self.num_kv_heads // number)
