"""Linear attention by Triton kernels, on CUDA: in chunks, and one token at a time.

One kernel goes through the chunks of each key/value head and stores the state before each of them; a second one
computes the outputs of all chunks at once. Query heads read the keys and values of their head where they are. Decoding
is one kernel, which advances the state and reads it. Features come from the maps as elsewhere, a segment at a time.

Training: the outputs come from the kernels, the gradients from the backward pass of the chunks (`gradient`, or for
decays autograd through one segment at a time).
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from types import ModuleType
from typing import Any, NamedTuple

import torch

from ...notation import compute_dtype
from ..blocks import learns, parameters_of
from ..folding import fold
from . import chunked, gradient
from .plan import Plan
from .segment import segments
from .state import EPS, LinearOutput, LinearState

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TILE = 64  # the longest side of a tile of a matrix product; the shortest that Triton multiplies is 16
STEP_TILE = 16_384  # elements of the product that one step of the decoding kernel sums
STEP_OPTIONS = {"num_warps": 8}


def linear_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, state: LinearState, plan: Plan, in_place: bool = False
) -> LinearOutput:
    """Compute by Triton kernels; arguments as in `hf_effattn.ops.linear.linear_attention`.

    Products of float32 inputs are float32, those of float16 inputs TF32, whose range is that of float32.

    Args:
        in_place: Whether the given state may be overwritten.

    Raises:
        ImportError: without Triton, which the extra `triton` installs.
        ValueError: on other devices than CUDA, for float64, and for the delta rule.
    """
    kernels = _kernels()
    _check(kernels, query, plan)
    if learns((query, key, value, *state), plan.modules):
        if plan.recurrence is not None:
            return chunked.in_blocks_of(_learning_segment, query, key, value, state, plan)
        output, carry = _Fused.apply(plan, query, key, value, state.sums, *parameters_of(plan.modules))
        return LinearOutput(output, LinearState(carry))
    if query.shape[2] == 1:
        return _one_token(query, key, value, state, plan, in_place)
    output, carry = _empty_output(query, value), state.sums
    for start, end in segments(query, plan.chunk):
        q, k, v, o = (x[:, :, start:end] for x in (query, key, value, output))
        carry = _segment(q, k, v, plan.part(start, end), carry, o)
    return LinearOutput(output, LinearState(carry))


class _Fused(gradient.Chunked):
    """The chunks' backward pass behind the kernels' forward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        plan: Plan,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        carry: torch.Tensor,
        *parameters: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.plan, ctx.cuts = plan, segments(query, plan.chunk, gradient.SEGMENT_BYTES)
        output, carries, denominators = _empty_output(query, value), [], []
        for start, end in ctx.cuts:
            carries.append(carry)
            q, k, v, o = (x[:, :, start:end] for x in (query, key, value, output))
            found = carry.new_empty(q.shape[:3])
            carry = _segment(q, k, v, plan.part(start, end), carry, o, found)
            folded = fold(found[..., None], plan.chunk)
            denominators.append(folded.view(folded.shape[0], key.shape[1], -1, 1))
        ctx.save_for_backward(query, key, value, output, *carries, *denominators, *parameters)
        return output, carry


def _learning_segment(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, plan: Plan, carry: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return output and state of one segment: on the way back, when autograd listens, by chunks."""
    if torch.is_grad_enabled():
        return chunked.segment_output(query, key, value, plan, carry)
    output = _empty_output(query, value)
    return output, _segment(query, key, value, plan, carry, output)


class _Decay(NamedTuple):
    """The decay as kernels take it.

    Args:
        log: `log α` `[B, G, T, 1 or F]`; None if the state does not decay.
        per_feature: Whether each feature has its own.
    """

    log: torch.Tensor | None
    per_feature: bool

    @property
    def strides(self) -> tuple[int, ...]:
        return (0, 0, 0) if self.log is None else self.log.stride()[:3]

    @property
    def flags(self) -> dict[str, bool]:
        return {"HEAD_DECAY": self.log is not None and not self.per_feature, "FEATURE_DECAY": self.per_feature}


def _mapped(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, plan: Plan
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, _Decay]:
    """Return features of queries and keys, values, and the decay, each with a contiguous last dimension."""
    log_decay = plan.gates(key).log_decay
    per_feature = plan.recurrence is not None and plan.recurrence.per_feature
    q, k, v = (_rows(x) for x in (plan.queries(query), plan.keys(key), value))
    return q, k, v, _Decay(None if log_decay is None else _rows(log_decay.float()), per_feature)


def _segment(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    plan: Plan,
    carry: torch.Tensor,
    output: torch.Tensor,
    denominators: torch.Tensor | None = None,
) -> torch.Tensor:
    """Compute one segment and return the state after it.

    Args:
        carry: The state before it `[B, G, F, V+1]`.
        output: Where the output goes `[B, H, T, V]`.
        denominators: Where denominators go `[B, H, T]`, if anywhere.
    """
    q, k, v, decay = _mapped(query, key, value, plan)
    (batch, heads, tokens, features), kv_heads, value_dim = q.shape, k.shape[1], v.shape[3]
    sides = chunk_sides(plan.chunk, features, value_dim)
    chunks = -(-tokens // sides["C"])
    carry, after = carry.contiguous(), torch.empty_like(carry, memory_format=torch.contiguous_format)
    kv_before = carry.new_empty(batch, kv_heads, chunks, features, value_dim, dtype=compute_dtype(value.dtype))
    normalizer_before = carry.new_empty(batch, kv_heads, chunks, features)
    constants = {"F": features, "V": value_dim, **sides, **decay.flags, "PRECISION": precision(value.dtype)}
    value_tiles, feature_tiles = -(-value_dim // sides["BV"]), -(-features // sides["BF"])
    options, kernels = chunk_options(value.dtype), _kernels()
    with _on_device_of(q):
        kernels.chunk_states[batch * kv_heads, feature_tiles, value_tiles](
            *(k, v, decay.log, carry, kv_before, normalizer_before, after, tokens, chunks, kv_heads),
            *(*k.stride()[:3], *v.stride()[:3], *decay.strides),
            **constants,
            **options,
        )
        kernels.chunk_outputs[batch * chunks * heads, value_tiles](
            *(q, k, v, decay.log, kv_before, normalizer_before, output, denominators),
            *(tokens, chunks, heads, heads // kv_heads),
            *(*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *decay.strides, *output.stride()[:3]),
            **constants,
            WRITE_DENOMINATORS=denominators is not None,
            EPS=EPS,
            **options,
        )
    return after


def _one_token(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, state: LinearState, plan: Plan, in_place: bool
) -> LinearOutput:
    """Advance the state by one token and read it."""
    q, k, v, decay = _mapped(query, key, value, plan)
    (batch, heads, _, features), kv_heads, value_dim = q.shape, k.shape[1], v.shape[3]
    sums = state.sums.contiguous()
    after = sums if in_place else torch.empty_like(sums)
    output = query.new_empty(batch, heads, 1, value_dim)
    with _on_device_of(q):
        _kernels().one_token[(batch * kv_heads,)](
            *(q, k, v, decay.log, sums, after, output, kv_heads),
            *(*q.stride()[:2], *k.stride()[:2], *v.stride()[:2], *decay.strides[:2]),
            F=features,
            V=value_dim,
            **step_sides(heads // kv_heads, features, value_dim),
            **decay.flags,
            EPS=EPS,
            **STEP_OPTIONS,
        )
    return LinearOutput(output, LinearState(after))


def chunk_sides(chunk: int, features: int, value_dim: int) -> dict[str, int]:
    """Return the sides of the tiles of the kernels for chunks of about this many tokens."""
    return {"C": _side(chunk // 2 + 1), "BF": _side(features), "BV": _side(value_dim)}


def chunk_options(dtype: torch.dtype) -> dict[str, int]:
    """Return how the kernels for chunks are compiled: float32 has no tensor cores, and keeps more in registers."""
    return {"num_warps": 8 if dtype == torch.float32 else 4, "num_stages": 2}


def step_sides(groups: int, features: int, value_dim: int) -> dict[str, int]:
    """Return the sides of the tiles of the kernel for one token, R query heads for each key/value head."""
    rows, columns = _power(groups), _power(value_dim)
    room = max(1, STEP_TILE // (rows * columns))
    return {"R": groups, "BR": rows, "BF": min(_power(features), room), "BV": columns}


def precision(dtype: torch.dtype) -> str:
    """Return how Triton multiplies float32 numbers that come from values of this dtype."""
    return "tf32" if dtype == torch.float16 else "ieee"


def _side(size: int) -> int:
    return min(max(_power(size), 16), TILE)


def _power(size: int) -> int:
    """The least power of two that is not less than `size`."""
    return 1 << (size - 1).bit_length()


def _on_device_of(x: torch.Tensor) -> AbstractContextManager[Any]:
    """Make x's device the one that kernels start on; compiled code sees to it by itself."""
    return nullcontext() if torch.compiler.is_compiling() else torch.cuda.device_of(x)


def _rows(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _empty_output(query: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Room for the output `[B, H, T, V]`, laid out as the projection behind it wants it."""
    batch, heads, tokens, _ = query.shape
    return query.new_empty(batch, tokens, heads, value.shape[-1]).transpose(1, 2)


def _kernels() -> ModuleType:
    try:
        from . import kernels
    except ImportError as error:
        raise ImportError("backend 'triton' needs Triton: pip install 'hf_effattn[triton]'") from error
    return kernels


def _check(kernels: ModuleType, query: torch.Tensor, plan: Plan) -> None:
    """Raise a ValueError for what the kernels do not compute."""
    others = "valid: auto, chunked, recurrent, reference"
    if plan.is_delta:
        name = type(plan.recurrence).__name__
        raise ValueError(f"backend 'triton' computes sums and decays, not the delta rule of {name}; {others}")
    if query.dtype not in DTYPES:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise ValueError(f"backend 'triton' computes {names}; got {query.dtype}; {others}")
    if not (query.is_cuda or kernels.INTERPRETED):
        raise ValueError(f"backend 'triton' needs a CUDA device; got tensors on {query.device}; {others}")
