"""What learned and random maps share: products with a matrix of each head, and orthogonal starts."""

from __future__ import annotations

import torch

SEED = 20_201


def by_head(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return `W x` for x `[B, H, T, D]` and a matrix of each head, weight `[H, X, D]`: `[B, H, T, X]`."""
    return torch.matmul(x, weight.to(x.dtype).transpose(1, 2))


def orthogonal_rows(num_rows: int, dim: int) -> torch.Tensor:
    """Return unit rows `[num_rows, dim]`, each block of `dim` of them orthogonal: always the same ones.

    Queries and keys of all heads must start from one matrix, else their products would mean nothing.
    """
    generator = torch.Generator().manual_seed(SEED)
    blocks = []
    for _ in range(-(-num_rows // dim)):
        basis, triangle = torch.linalg.qr(torch.randn(dim, dim, generator=generator, dtype=torch.float64))
        blocks.append(basis.T * triangle.diagonal().sign()[:, None])
    return torch.cat(blocks)[:num_rows].float()


def row_lengths(num_rows: int, dim: int) -> torch.Tensor:
    """Return lengths `[num_rows]` of normally distributed vectors of `dim` numbers: always the same ones."""
    generator = torch.Generator().manual_seed(SEED + 1)
    return torch.randn(num_rows, dim, generator=generator).norm(dim=1)


def triangle_products(x: torch.Tensor) -> torch.Tensor:
    """Return features `[..., X(X+1)/2]` whose dot product is `(x·y)²`, from x `[..., X]`.

    They are the products `x_i x_j` with `i ≤ j`, those with `i < j` times √2.
    """
    size = x.shape[-1]
    first, second = torch.triu_indices(size, size, device=x.device)
    weight = torch.where(first == second, x.new_ones(()), x.new_full((), 2.0).sqrt())
    return x[..., first] * x[..., second] * weight
