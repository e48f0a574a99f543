"""The delta rule in chunks: what the tokens of a chunk write follows from one triangular system (the WY form).

With `D_i` the log of the decay from the beginning of the chunk to token i, what token i writes is
`u_i = β_i (v_i − e^{D_i} S₀ᵀ k_i − Σ_{j<i} e^{D_i − D_j} (k_i·k_j) u_j)`, S₀ being the state before the chunk. So
`U = X_v − X_k S₀` with `(I + L) [X_v, X_k] = β ∘ [V, e^D ∘ K]` and `L_ij = β_i e^{D_i − D_j} k_i·k_j` for j < i, which
does not depend on S₀ (Yang 2024, arXiv 2406.06484 and 2412.06464). With U in place of V, all else is linear attention.
"""

from __future__ import annotations

import torch
from torch.nn import functional

from .segment import Segment, factor_of


def states_before(segment: Segment, carry: torch.Tensor) -> tuple[Segment, torch.Tensor, torch.Tensor]:
    """Return the segment with what its tokens write as values, the joined states before each chunk `[B·N, G, F, V+1]`,
    and the state after the segment `[B, G, F, V+1]`.

    Args:
        segment: With strengths; its decay, if any, is that of a head.
        carry: The joined state before the segment `[B, G, F, V+1]`, float32.
    """
    key, decay = segment.key, segment.decay
    assert segment.strength is not None
    products = torch.matmul(key, key.transpose(2, 3))  # [B·N, G, C, C]
    known, kept = key, key  # what reads the state before, what enters the state after
    factor = key.new_ones(key.shape[0], 1, 1, 1)  # of the state, over the chunk
    if decay is not None:
        assert decay.between is not None
        products = products * factor_of(decay.between).to(key.dtype)
        known, kept = key * factor_of(decay.from_start).to(key.dtype), key * factor_of(decay.to_end).to(key.dtype)
        factor = factor_of(decay.from_start[:, :, -1:])
    strength = segment.strength.to(key.dtype)
    sides = torch.cat((segment.value[..., :-1], known), dim=-1) * strength
    system = (products * strength).tril(-1)  # the ones of its diagonal are understood
    solved = torch.linalg.solve_triangular(system, sides, upper=False, unitriangular=True)
    of_values, of_keys = solved.split((segment.value.shape[-1] - 1, key.shape[-1]), dim=-1)

    chunks = (
        x.to(carry.dtype).unflatten(0, (carry.shape[0], -1)).unbind(1) for x in (of_values, of_keys, kept, factor)
    )
    before, written = [], []
    for values, keys, entering, remaining in zip(*chunks, strict=True):
        before.append(carry)
        new = functional.pad(values - torch.matmul(keys, carry[..., :-1]), (0, 1), value=1.0)
        written.append(new)
        carry = carry * remaining + torch.matmul(entering.transpose(2, 3), new)
    values = torch.stack(written, dim=1).flatten(0, 1).to(segment.value.dtype)
    return segment._replace(value=values), torch.stack(before, dim=1).flatten(0, 1), carry
