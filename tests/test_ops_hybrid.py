"""The hybrid operation: laws 2 and 3, and what it becomes at its limits."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_ops_linear import relative

from hf_effattn.config import JOINS
from hf_effattn.feature_maps import FEATURE_MAPS
from hf_effattn.ops.hybrid import HybridOptions, hybrid_attention
from hf_effattn.ops.linear import LinearState, empty_state, linear_attention
from hf_effattn.ops.sparse import sparse_attention
from hf_effattn.ops.stream import Stream
from hf_effattn.patterns import streaming

HEADS, KV_HEADS, DIM, VALUE = 4, 2, 8, 5
every_map = pytest.mark.parametrize("name", list(FEATURE_MAPS))


def options(
    name: str, window: int, num_sinks: int, chunk: int = 16, bias: float = 0.0, join: str = "log"
) -> HybridOptions:
    make = FEATURE_MAPS.get(name)
    biases = torch.randn(HEADS, generator=torch.Generator().manual_seed(3)) + bias
    return HybridOptions(make(DIM, HEADS), make(DIM, KV_HEADS), biases, window, num_sinks, DIM**-0.5, chunk, join)


def inputs(batch: int, length: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return tuple(
        torch.randn(batch, heads, length, dim) for heads, dim in ((HEADS, DIM), (KV_HEADS, DIM), (KV_HEADS, VALUE))
    )  # type: ignore[return-value]


def remembered(o: HybridOptions) -> LinearState:
    """The state of some keys, in two rows."""
    key, value = torch.randn(2, KV_HEADS, 50, DIM), torch.randn(2, KV_HEADS, 50, VALUE)
    features = o.key_map(key, torch.arange(50)[None]).detach()
    return LinearState.of(features.transpose(2, 3) @ value, features.sum(dim=2))


@every_map
@settings(max_examples=10)
@given(
    length=st.integers(1, 150) | st.just(600),
    window=st.integers(1, 40),
    num_sinks=st.integers(0, 9),
    chunk=st.sampled_from([4, 16, 64]),
    past=st.none() | st.lists(st.integers(0, 300), min_size=2, max_size=2),
    short=st.integers(0, 5),
    join=st.sampled_from(list(JOINS)),
)
def test_fast_is_slow(
    name: str, join: str, length: int, window: int, num_sinks: int, chunk: int, past: list[int] | None, short: int
) -> None:
    torch.manual_seed(length)
    o, (q, k, v) = options(name, window, num_sinks, chunk, join=join), inputs(2, length)
    state, stream, lengths = empty_state(2, KV_HEADS, o.key_map.feature_dim, VALUE, like=q), Stream(k, v), None
    if past is not None:
        before = [torch.randn(2, KV_HEADS, window, dim) for dim in (DIM, VALUE)]
        sinks = [torch.randn(2, KV_HEADS, num_sinks, dim) for dim in (DIM, VALUE)]
        first = torch.tensor(past) - window
        stream = Stream(
            torch.cat((before[0], k), 2), torch.cat((before[1], v), 2), first, int(first.min()), sinks[0], sinks[1]
        )
        state = remembered(o)
        lengths = torch.tensor([length, max(length - short, 0)])
    expected = hybrid_attention(q, stream, state, o, lengths=lengths, backend="reference")
    actual = hybrid_attention(q, stream, state, o, lengths=lengths)
    real = torch.ones(2, length) if lengths is None else (torch.arange(length) < lengths[:, None]).float()
    assert relative(actual.output * real[:, None, :, None], expected.output * real[:, None, :, None]) <= 1e-6
    assert relative(actual.state.kv, expected.state.kv) <= 1e-6
    assert relative(actual.state.normalizer, expected.state.normalizer) <= 1e-6


@pytest.mark.parametrize("join", JOINS)
@every_map
def test_gradients_are_those_of_the_reference(name: str, join: str) -> None:
    o, (q, k, v) = options(name, 9, 2, join=join), inputs(2, 90)
    leaves = [x.requires_grad_() for x in (q, k, v, o.bias)]
    leaves += [*o.query_map.parameters(), *o.key_map.parameters()]
    weight = torch.randn(2, HEADS, 90, VALUE)
    state = empty_state(2, KV_HEADS, o.key_map.feature_dim, VALUE, like=q)
    gradients = {}
    for backend in ("reference", "chunked"):
        output, new = hybrid_attention(q, Stream(k, v), state, o, backend=backend)
        gradients[backend] = torch.autograd.grad((output * weight).sum() + new.kv.pow(2).sum(), leaves)
    for actual, expected in zip(gradients["chunked"], gradients["reference"], strict=True):
        assert relative(actual, expected) <= 2e-6


@every_map
def test_bfloat16_stays_within_its_rounding(name: str) -> None:
    o, (q, k, v) = options(name, 16, 4), (x.bfloat16().requires_grad_() for x in inputs(1, 400))
    state, weight = empty_state(1, KV_HEADS, o.key_map.feature_dim, VALUE, like=q), torch.randn(1, HEADS, 400, VALUE)
    found = {}
    for backend in ("reference", "chunked"):
        output, new = hybrid_attention(q, Stream(k, v), state, o, backend=backend)
        assert output.dtype == torch.bfloat16
        assert new.kv.dtype == torch.float32
        found[backend] = [output, *torch.autograd.grad((output.float() * weight).sum(), (q, k, v))]
    for index, (actual, expected) in enumerate(zip(found["chunked"], found["reference"], strict=True)):
        assert relative(actual, expected) <= (1e-2 if index else 6e-3), index


@pytest.mark.parametrize("backend", ["reference", "chunked"])
@every_map
@given(length=st.integers(2, 100), at=st.integers(1, 99))
def test_nothing_from_the_future(name: str, backend: str, length: int, at: int) -> None:
    at = at % length
    o, (q, k, v) = options(name, 7, 2), inputs(1, length)
    state = empty_state(1, KV_HEADS, o.key_map.feature_dim, VALUE, like=q)
    before = hybrid_attention(q, Stream(k, v), state, o, backend=backend).output
    for x in (q, k, v):
        x[:, :, at] = 7.0
    after = hybrid_attention(q, Stream(k, v), state, o, backend=backend).output
    assert torch.equal(before[:, :, :at], after[:, :, :at])


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_closed_is_streaming_and_wide_open_is_linear(backend: str) -> None:
    q, k, v = inputs(1, 80)
    closed, opened = options("elu", 9, 2, bias=-60.0), options("elu", 1, 0, bias=60.0)
    state = empty_state(1, KV_HEADS, DIM, VALUE, like=q)
    window = hybrid_attention(q, Stream(k, v), state, closed, backend=backend).output
    torch.testing.assert_close(window, sparse_attention(q, k, v, streaming(9, 2)), atol=1e-6, rtol=1e-5)
    linear = hybrid_attention(q, Stream(k, v), state, opened, backend=backend).output
    late = torch.cat((torch.zeros_like(k[:, :, :1]), closed.key_map(k)[:, :, :-1]), dim=2)
    late_value = torch.cat((torch.zeros_like(v[:, :, :1]), v[:, :, :-1]), dim=2)
    expected = linear_attention(closed.query_map(q), late, late_value).output
    torch.testing.assert_close(linear[:, :, 1:], expected[:, :, 1:], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 300.0])
def test_extreme_scores_stay_finite(scale: float) -> None:
    """Scores of ±hundreds, where exponentials of one part leave float32's range."""
    for sign in (1.0, -1.0):
        o = options("relu", 3, 1, 4)
        q, k, v = inputs(1, 40)
        leaves = [
            (q * scale).requires_grad_(),
            (sign * q[:, ::2] * scale).detach().requires_grad_(),
            v.requires_grad_(),
        ]
        state = empty_state(1, KV_HEADS, DIM, VALUE, like=q)
        output = hybrid_attention(leaves[0], Stream(leaves[1], leaves[2]), state, o).output
        assert output.isfinite().all()
        assert all(g.isfinite().all() for g in torch.autograd.grad(output.sum(), leaves))


def test_bad_input_is_named() -> None:
    o, (q, k, v) = options("elu", 4, 0), inputs(1, 9)
    state = empty_state(1, KV_HEADS, DIM, VALUE, like=q)
    with pytest.raises(ValueError, match="valid: auto, reference, chunked"):
        hybrid_attention(q, Stream(k, v), state, o, backend="triton")
    with pytest.raises(ValueError, match="0 or window = 4 keys before"):
        hybrid_attention(q[:, :, 2:], Stream(k, v), state, o)
