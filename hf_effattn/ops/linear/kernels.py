"""Triton kernels of linear attention. Imported on first use only, since Triton is optional: see `triton.py` beside it.

Letters as in `hf_effattn.notation`; BF, BV and BR are the sides of tiles. Strides are called after tensor and dimension
(`key_t` is that of tokens); the last dimension of each tensor is contiguous. Products are accumulated in float32.
"""

from __future__ import annotations

import os

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")  # as Triton decides for the kernels below

# In a chunk of 16 tokens a feature decays to e^-80 at the least (`LEAST` and `PER_FEATURE_CHUNK` of recurrences). This
# is about e^40, so what queries and keys are multiplied by is far from the limits of float32. A factor taken from
# the middle of the chunk would do the same, but let later tokens change how earlier ones are rounded.
HALF = tl.constexpr(2.0**58)


@triton.jit
def _tile(start, rows, columns, row_stride, num_rows, num_columns):
    """Load `[rows, columns]` of a matrix, zeros outside of it."""
    inside = (rows[:, None] < num_rows) & (columns[None, :] < num_columns)
    return tl.load(start + rows[:, None] * row_stride + columns[None, :], mask=inside, other=0.0)


@triton.jit
def _add_product(sums, a, b, PRECISION: tl.constexpr):
    """Return float32 `sums + a b`."""
    if INTERPRETED:  # it multiplies the bits of bfloat16 as if they were integers
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, sums, input_precision=PRECISION)


@triton.jit
def chunk_states(
    key,
    value,
    log_decay,
    state,
    kv_before,
    normalizer_before,
    state_after,
    tokens,
    chunks,
    kv_heads,
    key_b,
    key_g,
    key_t,
    value_b,
    value_g,
    value_t,
    log_decay_b,
    log_decay_g,
    log_decay_t,
    F: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    BF: tl.constexpr,
    BV: tl.constexpr,
    HEAD_DECAY: tl.constexpr,
    FEATURE_DECAY: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Go through the chunks of one key/value head, for one tile of its state, and store the state before each of them.

    Grid `(B·G, tiles of F, tiles of V)`. Key `[B, G, T, F]`, value `[B, G, T, V]`, log α `[B, G, T]` for a decay of
    heads and `[B, G, T, F]` for one of features; states `[B, G, F, V+1]`; `kv_before` `[B, G, N, F, V]` in the dtype of
    the products, `normalizer_before` `[B, G, N, F]`.
    """
    row = tl.program_id(0).to(tl.int64)
    f = tl.program_id(1) * BF + tl.arange(0, BF)
    v = tl.program_id(2) * BV + tl.arange(0, BV)
    c = tl.arange(0, C)
    b, g = row // kv_heads, row % kv_heads
    key += b * key_b + g * key_g
    value += b * value_b + g * value_g
    if HEAD_DECAY or FEATURE_DECAY:
        log_decay += b * log_decay_b + g * log_decay_g
    state += row * F * (V + 1)
    state_after += row * F * (V + 1)
    kv_before += row * chunks * F * V
    normalizer_before += row * chunks * F
    inside = (f[:, None] < F) & (v[None, :] < V)
    is_first = tl.program_id(2) == 0  # the tiles of V share the normaliser: one of them writes it

    kv = _tile(state, f, v, V + 1, F, V)
    normalizer = tl.load(state + f * (V + 1) + V, mask=f < F, other=0.0)
    for n in range(chunks):
        tl.store(kv_before + f[:, None] * V + v[None, :], kv.to(kv_before.dtype.element_ty), mask=inside)
        if is_first:
            tl.store(normalizer_before + f, normalizer, mask=f < F)
        kv_before += F * V
        normalizer_before += F
        t = n * C + c
        k = _tile(key, t, f, key_t, tokens, F)
        x = _tile(value, t, v, value_t, tokens, V).to(kv_before.dtype.element_ty)
        # What decays behind a token is summed from there on: a difference of sums would lose digits.
        later = tl.where(c + 1 < C, t + 1, tokens)
        if HEAD_DECAY:
            behind = tl.load(log_decay + later * log_decay_t, mask=later < tokens, other=0.0)
            whole = tl.load(log_decay + t * log_decay_t, mask=t < tokens, other=0.0)
            k = k * tl.exp(tl.cumsum(behind, axis=0, reverse=True))[:, None]
            kept = tl.exp(tl.sum(whole, axis=0))
            kv = kv * kept
            normalizer = normalizer * kept
        if FEATURE_DECAY:
            behind = _tile(log_decay, later, f, log_decay_t, tokens, F)
            whole = _tile(log_decay, t, f, log_decay_t, tokens, F)
            k = k * tl.exp(tl.cumsum(behind, axis=0, reverse=True))
            kept = tl.exp(tl.sum(whole, axis=0))
            kv = kv * kept[:, None]
            normalizer = normalizer * kept
        k = k.to(kv_before.dtype.element_ty)
        kv = _add_product(kv, tl.trans(k), x, PRECISION)
        normalizer += tl.sum(k.to(tl.float32), axis=0)
    tl.store(state_after + f[:, None] * (V + 1) + v[None, :], kv, mask=inside)
    if is_first:
        tl.store(state_after + f * (V + 1) + V, normalizer, mask=f < F)


@triton.jit
def chunk_outputs(
    query,
    key,
    value,
    log_decay,
    kv_before,
    normalizer_before,
    output,
    denominators,
    tokens,
    chunks,
    heads,
    groups,
    query_b,
    query_h,
    query_t,
    key_b,
    key_g,
    key_t,
    value_b,
    value_g,
    value_t,
    log_decay_b,
    log_decay_g,
    log_decay_t,
    output_b,
    output_h,
    output_t,
    F: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    BF: tl.constexpr,
    BV: tl.constexpr,
    HEAD_DECAY: tl.constexpr,
    FEATURE_DECAY: tl.constexpr,
    WRITE_DENOMINATORS: tl.constexpr,
    EPS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Compute one tile of the output of one query head in one chunk: `(tril(φQ φKᵀ) V + φQ S) / (the same of ones)`.

    Grid `(B·N·H, tiles of V)`: heads that share keys, values and states follow each other. Query `[B, H, T, F]`, output
    `[B, H, T, V]`, denominators `[B, H, T]` float32; the rest as in `chunk_states`.
    """
    program = tl.program_id(0).to(tl.int64)
    h, n, b = program % heads, (program // heads) % chunks, program // (heads * chunks)
    g = h // groups
    row = (b * (heads // groups) + g) * chunks + n
    c = tl.arange(0, C)
    t = (n * C).to(tl.int32) + c
    v = tl.program_id(1) * BV + tl.arange(0, BV)
    query += b * query_b + h * query_h
    key += b * key_b + g * key_g
    if HEAD_DECAY or FEATURE_DECAY:
        log_decay += b * log_decay_b + g * log_decay_g
    kv_before += row * F * V
    normalizer_before += row * F

    weights = tl.zeros((C, C), dtype=tl.float32)
    sums = tl.zeros((C, BV), dtype=tl.float32)
    mass = tl.zeros((C,), dtype=tl.float32)
    for start in range(0, F, BF):
        f = start + tl.arange(0, BF)
        q = _tile(query, t, f, query_t, tokens, F)
        k = _tile(key, t, f, key_t, tokens, F)
        kv = _tile(kv_before, f, v, V, F, V)
        normalizer = tl.load(normalizer_before + f, mask=f < F, other=0.0)
        reading = q
        if FEATURE_DECAY:
            since = tl.cumsum(_tile(log_decay, t, f, log_decay_t, tokens, F), axis=0)
            reading = q * tl.exp(since)
            q = q * (tl.exp(since) * HALF)
            k = k * (tl.exp(-since) / HALF)
        reading = reading.to(kv.dtype)
        weights = _add_product(weights, q.to(kv.dtype), tl.trans(k.to(kv.dtype)), PRECISION)
        sums = _add_product(sums, reading, kv, PRECISION)
        mass += tl.sum(reading.to(tl.float32) * normalizer[None, :], axis=1)
    if HEAD_DECAY:
        decay = tl.load(log_decay + t * log_decay_t, mask=t < tokens, other=0.0)
        since = tl.exp(tl.cumsum(decay, axis=0))
        sums = sums * since[:, None]
        mass = mass * since
        between = tl.where(c[:, None] > c[None, :], decay[:, None], 0.0)
        weights = weights * tl.exp(tl.cumsum(between, axis=0))
    value += b * value_b + g * value_g
    x = _tile(value, t, v, value_t, tokens, V).to(kv_before.dtype.element_ty)
    rounded = tl.where(c[:, None] >= c[None, :], weights, 0.0).to(x.dtype)
    sums = _add_product(sums, rounded, x, PRECISION)
    mass += tl.sum(rounded.to(tl.float32), axis=1)

    output += b * output_b + h * output_h
    inside = (t[:, None] < tokens) & (v[None, :] < V)
    result = (sums / tl.maximum(mass, EPS)[:, None]).to(output.dtype.element_ty)
    tl.store(output + t[:, None] * output_t + v[None, :], result, mask=inside)
    if WRITE_DENOMINATORS:
        if tl.program_id(1) == 0:
            tl.store(denominators + (b * heads + h) * tokens + t, mass, mask=t < tokens)


@triton.jit
def one_token(
    query,
    key,
    value,
    log_decay,
    state,
    state_after,
    output,
    kv_heads,
    query_b,
    query_h,
    key_b,
    key_g,
    value_b,
    value_g,
    log_decay_b,
    log_decay_g,
    R: tl.constexpr,
    F: tl.constexpr,
    V: tl.constexpr,
    BR: tl.constexpr,
    BF: tl.constexpr,
    BV: tl.constexpr,
    HEAD_DECAY: tl.constexpr,
    FEATURE_DECAY: tl.constexpr,
    EPS: tl.constexpr,
):
    """Let one token enter the state of one key/value head, and read it with the queries that share this head.

    Grid `(B·G,)`. Query `[B, H, 1, F]`, key `[B, G, 1, F]`, value `[B, G, 1, V]`, log α `[B, G, 1, 1 or F]`, states
    `[B, G, F, V+1]`, which may be the same; output `[B, H, 1, V]`, contiguous. One program has the whole state of its
    head, so that none reads a normaliser that another one has already overwritten.
    """
    row = tl.program_id(0).to(tl.int64)
    b, g = row // kv_heads, row % kv_heads
    r = tl.arange(0, BR)
    v = tl.arange(0, BV)
    query += b * query_b + g * R * query_h
    key += b * key_b + g * key_g
    if HEAD_DECAY or FEATURE_DECAY:
        log_decay += b * log_decay_b + g * log_decay_g
    state += row * F * (V + 1)
    state_after += row * F * (V + 1)

    x = tl.load(value + b * value_b + g * value_g + v, mask=v < V, other=0.0).to(tl.float32)
    sums = tl.zeros((BR, BV), dtype=tl.float32)
    mass = tl.zeros((BR,), dtype=tl.float32)
    for start in range(0, F, BF):
        f = start + tl.arange(0, BF)
        q = _tile(query, r, f, query_h, R, F).to(tl.float32)
        k = tl.load(key + f, mask=f < F, other=0.0).to(tl.float32)
        kv = _tile(state, f, v, V + 1, F, V)
        normalizer = tl.load(state + f * (V + 1) + V, mask=f < F, other=0.0)
        if HEAD_DECAY:
            kept = tl.exp(tl.load(log_decay))
            kv = kv * kept
            normalizer = normalizer * kept
        if FEATURE_DECAY:
            kept = tl.exp(tl.load(log_decay + f, mask=f < F, other=0.0))
            kv = kv * kept[:, None]
            normalizer = normalizer * kept
        kv += k[:, None] * x[None, :]
        normalizer += k
        tl.store(state_after + f[:, None] * (V + 1) + v[None, :], kv, mask=(f[:, None] < F) & (v[None, :] < V))
        tl.store(state_after + f * (V + 1) + V, normalizer, mask=f < F)
        sums += tl.sum(q[:, :, None] * kv[None, :, :], axis=1)
        mass += tl.sum(q * normalizer[None, :], axis=1)
    result = (sums / tl.maximum(mass, EPS)[:, None]).to(output.dtype.element_ty)
    tl.store(output + (row * R + r[:, None]) * V + v[None, :], result, mask=(r[:, None] < R) & (v[None, :] < V))
