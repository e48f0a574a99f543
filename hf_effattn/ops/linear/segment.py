"""Segments of linear attention: several chunks that are mapped, folded and computed at once."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch.nn import functional

from ...notation import compute_dtype, state_dtype
from ..folding import fold, fold_marks
from .plan import Plan

SEGMENT_BYTES = 2048  # of a number for each token of a segment: 512 tokens in float32, 1,024 in bfloat16
CUDA_TOKENS = 16_384
LEAST_LOG = -60.0  # of a decay: e⁻⁶⁰ of what was is nothing beside a denominator's guard, yet far from float32's least


class Decay(NamedTuple):
    """Logarithms of how far the state decays within a chunk. They are sums of numbers of one sign, never differences of
    sums, so that strong decays keep their digits.

    Args:
        from_start: From the beginning of the chunk to each token, its own decay included, `[B·N, G, C, 1 or F]`.
        to_end: From behind each token to the end of the chunk, likewise.
        between: From behind each token (last dimension) to each later one, its own included, `[B·N, G, C, C]`; None if
            features decay each by itself.
    """

    from_start: torch.Tensor
    to_end: torch.Tensor
    between: torch.Tensor | None

    @classmethod
    def of(cls, log_decay: torch.Tensor) -> Decay:
        """Return the decays of tokens with `log α` `[B·N, G, C, 1 or F]`."""
        later = functional.pad(log_decay[:, :, 1:], (0, 0, 0, 1))
        between = None
        if log_decay.shape[3] == 1:
            between = log_decay.expand(-1, -1, -1, log_decay.shape[2]).tril(-1).cumsum(dim=2)
        return cls(log_decay.cumsum(dim=2), later.flip(2).cumsum(dim=2).flip(2), between)


def factor_of(log_decay: torch.Tensor) -> torch.Tensor:
    """Return `e^x` for logarithms of decays, at least `e^LEAST_LOG`: exponentials and products near the least numbers
    of float32 take a CPU up to a hundred times longer."""
    return log_decay.clamp(min=LEAST_LOG).exp()


class Segment(NamedTuple):
    """One segment of N whole chunks, mapped and folded.

    Args:
        query: Features `[B·N, G, R·C, F]`, heads folded into rows, head-major.
        key: Features `[B·N, G, C, F]`, zero where there is no key.
        value: Values with a column of ones `[B·N, G, C, V+1]`.
        decay: How the state decays; None if it does not.
        strength: β of a delta rule `[B·N, G, C, 1]`; None without.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    decay: Decay | None = None
    strength: torch.Tensor | None = None


def segments(query: torch.Tensor, chunk: int, bytes_: int = SEGMENT_BYTES) -> list[tuple[int, int]]:
    """Cut the tokens of query `[B, H, T, ·]` into segments of whole chunks (the last may be partial).

    On a CPU the scratch memory of a segment should fit into its cache; elsewhere few large segments are faster.

    Args:
        chunk: Tokens of one chunk.
        bytes_: Of one number for each token of a segment.
    """
    tokens = query.shape[2]
    size = bytes_ // compute_dtype(query.dtype).itemsize if query.device.type == "cpu" else CUDA_TOKENS
    size = max(chunk, size // chunk * chunk)
    return [(start, min(start + size, tokens)) for start in range(0, tokens, size)]


def fold_segment(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, plan: Plan) -> Segment:
    """Map and fold the tokens of one segment: query `[B, H, T, ·]`, key `[B, G, T, ·]`, value `[B, G, T, V]`."""
    chunk, batch, tokens = plan.chunk, key.shape[0], key.shape[2]
    dtype = state_dtype(value.dtype) if plan.is_delta else compute_dtype(value.dtype)
    real = plan.real
    if real is None and tokens % chunk:  # a map makes features of the zeros behind the last key
        real = torch.ones(1, tokens, dtype=torch.bool, device=key.device)
    query_at, key_at, real = (fold_marks(x, batch, chunk) for x in (plan.query_at, plan.key_at, real))
    folded = plan._replace(query_at=query_at, key_at=key_at, real=real)
    arrange = functools.partial(fold, chunk=chunk)
    q, k, v = folded.queries(query, arrange).to(dtype), folded.keys(key, arrange).to(dtype), arrange(value).to(dtype)
    rows = query.shape[1] // key.shape[1] * chunk
    decay, strength = folded.gates(key, arrange)
    return Segment(
        q.view(q.shape[0], key.shape[1], rows, -1),
        k,
        functional.pad(v, (0, 1), value=1.0),
        None if decay is None else Decay.of(decay),
        strength,
    )


def states_before(segment: Segment, carry: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the joined states before each chunk `[B·N, G, F, V+1]`, and after the segment `[B, G, F, V+1]`.

    Args:
        carry: The joined state before the segment `[B, G, F, V+1]`, float32.
    """
    if segment.decay is None:
        return _sums_before(torch.matmul(segment.key.transpose(2, 3), segment.value), carry)
    remembered = (segment.key * factor_of(segment.decay.to_end)).to(segment.key.dtype)  # at the end of the chunk
    added = torch.matmul(remembered.transpose(2, 3), segment.value)
    return _decaying_sums_before(added, factor_of(segment.decay.from_start[:, :, -1:]).transpose(2, 3), carry)


def attend(segment: Segment, before: torch.Tensor) -> torch.Tensor:
    """Return numerators and denominators `[B·N, G, R·C, V+1]`: `tril(φQ φKᵀ) [V, 1] + φQ S`."""
    query, key, decay = segment.query, segment.key, segment.decay
    if decay is None:
        weights = within_chunk(query, key)
    else:
        groups = query.shape[2] // key.shape[2]
        rows = decay.from_start.repeat(1, 1, groups, 1)  # [B·N, G, R·C, 1 or F]
        if decay.between is not None:
            factors = factor_of(decay.between).to(query.dtype).repeat(1, 1, groups, 1)
            weights = within_chunk(query, key) * factors
        else:  # relative to the middle of the chunk, so that no exponential leaves float32
            middle = decay.from_start[:, :, key.shape[2] // 2, None]
            late, early = query * (rows - middle).exp(), key * (middle - decay.from_start).exp()
            weights = within_chunk(late.to(query.dtype), early.to(query.dtype))
        query = (query * factor_of(rows)).to(query.dtype)
    past = torch.matmul(query, before.to(query.dtype))
    output = torch.baddbmm(past.flatten(0, 1), weights.flatten(0, 1), segment.value.flatten(0, 1))
    return output.view(past.shape)


def within_chunk(rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Return the products of rows `[·, G, R·C, X]` with columns `[·, G, C, X]` not after them: `[·, G, R·C, C]`."""
    products = torch.matmul(rows, columns.transpose(2, 3))
    chunk = columns.shape[2]
    return products.view(*products.shape[:2], -1, chunk, chunk).tril_().view(products.shape)


def sums_after(added: torch.Tensor, after: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return for each chunk `after` and what the chunks behind it add, `[B·N, G, F, X]`, and the sum of all.

    Args:
        added: `[B·N, G, F, X]`; after: `[B, G, F, X]`.
    """
    terms = torch.cat((_by_chunk(added, after), after.reshape(after.shape[0], 1, -1)), dim=1)
    triangle = after.new_ones(terms.shape[1], terms.shape[1]).triu()
    sums = torch.matmul(triangle, terms)  # [B, N+1, G·F·X]
    return sums[:, 1:].reshape(added.shape), sums[:, 0].clone().view(after.shape)


def _sums_before(added: torch.Tensor, carry: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return for each chunk the carry and what the chunks before it add, `[B·N, G, F, X]`, and the sum of all."""
    terms = torch.cat((carry.reshape(carry.shape[0], 1, -1), _by_chunk(added, carry)), dim=1)
    triangle = carry.new_ones(terms.shape[1], terms.shape[1]).tril()
    sums = torch.matmul(triangle, terms)  # [B, N+1, G·F·X]
    return sums[:, :-1].reshape(added.shape), sums[:, -1].clone().view(carry.shape)


def _decaying_sums_before(
    added: torch.Tensor, factor: torch.Tensor, carry: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the states before each chunk `[B·N, G, F, X]`, and the one after all, when each chunk multiplies by
    `factor` `[B·N, G, 1 or F, 1]` what it finds."""
    before = []
    by_chunk = (x.to(carry.dtype).unflatten(0, (carry.shape[0], -1)).unbind(1) for x in (added, factor))
    for new, kept in zip(*by_chunk, strict=True):
        before.append(carry)
        carry = torch.addcmul(new, kept, carry)
    return torch.stack(before, dim=1).flatten(0, 1), carry


def _by_chunk(added: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
    """`[B·N, G, F, X]` as `[B, N, G·F·X]` in the dtype of the state."""
    return added.view(state.shape[0], added.shape[0] // state.shape[0], -1).to(state.dtype)
