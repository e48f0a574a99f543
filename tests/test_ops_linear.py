"""The linear operation: law 2 (fast = slow), law 3 (nothing from the future), and what it refuses."""

from __future__ import annotations

import functools
import sys
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from hf_effattn.feature_maps import FEATURE_MAPS
from hf_effattn.ops.linear import BACKENDS, LinearState, linear_attention

EVERYWHERE = sorted(set(BACKENDS) - {"triton"})  # which `test_triton` compares
FAST = sorted(set(EVERYWHERE) - {"reference"})
fast = pytest.mark.parametrize("backend", FAST)


def inputs(batch: int, kv_heads: int, groups: int, length: int, **options: Any) -> list[torch.Tensor]:
    """Queries and keys mapped by elu + 1, and values."""
    shape = (batch, kv_heads, length)
    q, k = torch.randn(batch, kv_heads * groups, length, 6, **options), torch.randn(*shape, 6, **options)
    return [functional.elu(q) + 1, functional.elu(k) + 1, torch.randn(*shape, 5, **options)]


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    actual, expected = actual.detach().double(), expected.detach().double()
    return float((actual - expected).norm() / expected.norm().clamp(min=1e-30))


shapes = {
    "batch": st.integers(1, 3),
    "kv_heads": st.integers(1, 2),
    "groups": st.integers(1, 3),
    "length": st.integers(1, 150) | st.just(600),
    "chunk": st.integers(1, 70),
}


@fast
@settings(max_examples=25)
@given(**shapes)
def test_fast_is_slow(backend: str, batch: int, kv_heads: int, groups: int, length: int, chunk: int) -> None:
    length = min(length, 200) if backend == "recurrent" else length
    torch.manual_seed(length)
    q, k, v = inputs(batch, kv_heads, groups, length)
    state = LinearState.of(torch.rand(batch, kv_heads, 6, 5), torch.rand(batch, kv_heads, 6))
    mask = torch.rand(batch, length) > 0.2
    for past in (None, state):
        for padding in (None, mask):
            options = {"state": past, "padding_mask": padding, "chunk_size": chunk}
            expected = linear_attention(q, k, v, backend="reference", **options)
            actual = linear_attention(q, k, v, backend=backend, **options)
            assert relative(actual.output, expected.output) <= 1e-6
            assert relative(actual.state.kv, expected.state.kv) <= 1e-6
            assert relative(actual.state.normalizer, expected.state.normalizer) <= 1e-6


@fast
def test_gradients_are_those_of_the_reference(backend: str) -> None:
    leaves = [x.requires_grad_() for x in inputs(2, 2, 3, 130)]
    state = [x.requires_grad_() for x in (torch.rand(2, 2, 6, 5), torch.rand(2, 2, 6))]
    weight = torch.randn(2, 6, 130, 5)
    gradients = {}
    for name in ("reference", backend):
        output, new = linear_attention(*leaves, state=LinearState.of(*state), chunk_size=32, backend=name)
        loss = (output * weight).sum() + new.kv.pow(2).sum() + new.normalizer.sum()
        gradients[name] = torch.autograd.grad(loss, [*leaves, *state])
    for actual, expected in zip(gradients[backend], gradients["reference"], strict=True):
        assert relative(actual, expected) <= 2e-6


@pytest.mark.parametrize("length", [40, 130, 600])
@pytest.mark.parametrize("name", list(FEATURE_MAPS))
def test_mapping_by_segments_is_mapping_all(name: str, length: int) -> None:
    """Outputs, states and gradients, of the maps' parameters too, with padding and a past."""
    maps = [FEATURE_MAPS.get(name)(16, heads) for heads in (6, 2)]
    torch.manual_seed(0)
    for parameter in (p for m in maps for p in m.parameters()):
        parameter.data += 0.1 * torch.randn_like(parameter)
    leaves = [torch.randn(2, heads, length, dim, requires_grad=True) for heads, dim in ((6, 16), (2, 16), (2, 5))]
    features = maps[1](torch.randn(2, 2, 9, 16), torch.arange(9)[None]).detach()
    state = LinearState.of(features.transpose(2, 3) @ torch.randn(2, 2, 9, 5), features.sum(dim=2))
    leaves += [x.requires_grad_() for x in state]
    mask = torch.rand(2, length) > 0.2
    at = torch.arange(length)[None] + torch.tensor([[9], [12]])
    weight = torch.randn(2, 6, length, 5)
    everything = [*leaves, *(p for m in maps for p in m.parameters())]
    options: dict[str, Any] = {"state": LinearState(leaves[3]), "padding_mask": mask, "positions": at}
    options |= {"query_map": maps[0], "key_map": maps[1], "chunk_size": 32}
    found = {}
    for backend in ("reference", "chunked"):
        call = functools.partial(linear_attention, *leaves[:3], backend=backend, **options)
        output, new = call()
        loss = (output * weight).sum() + new.kv.pow(2).mean() + new.normalizer.mean()
        found[backend] = [output, *new, *torch.autograd.grad(loss, everything)]
        with torch.no_grad():
            again = call()
        assert torch.equal(again.output, output)
    for index, (actual, expected) in enumerate(zip(found["chunked"], found["reference"], strict=True)):
        assert relative(actual, expected) <= (2e-6 if index > 1 else 1e-6), index


@fast
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_within_its_rounding(backend: str, dtype: torch.dtype) -> None:
    leaves = [x.to(dtype).requires_grad_() for x in inputs(1, 2, 3, 300)]
    weight = torch.randn(1, 6, 300, 5)
    results = {}
    for name in ("reference", backend):
        output, state = linear_attention(*leaves, backend=name)
        assert output.dtype == dtype
        assert state.kv.dtype == state.normalizer.dtype == torch.float32
        results[name] = [output, *torch.autograd.grad((output.float() * weight).sum(), leaves)]
    for index, (actual, expected) in enumerate(zip(results[backend], results["reference"], strict=True)):
        assert relative(actual, expected) <= (1e-2 if index else 6e-3)


@fast
def test_a_long_half_precision_text_does_not_drift(backend: str) -> None:
    q, k, v = inputs(1, 1, 1, 4096)
    exact = linear_attention(q, k, v, backend="reference").output
    half = linear_attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), backend=backend).output
    assert relative(half[:, :, -512:], exact[:, :, -512:]) <= 1e-2


@pytest.mark.parametrize("name", list(FEATURE_MAPS))
def test_token_by_token_stays_with_the_chunks_for_8192_tokens(name: str) -> None:
    maps = [FEATURE_MAPS.get(name)(32, 1).bfloat16() for _ in range(2)]
    q, k, v = (torch.randn(1, 1, 8192, 32).bfloat16() for _ in range(3))
    options: dict[str, Any] = {"query_map": maps[0], "key_map": maps[1], "positions": torch.arange(8192)[None]}
    with torch.no_grad():
        chunked, recurrent = (linear_attention(q, k, v, backend=b, **options) for b in ("chunked", "recurrent"))
    assert relative(chunked.output[:, :, -512:], recurrent.output[:, :, -512:]) <= 5e-3
    assert relative(chunked.state.kv, recurrent.state.kv) <= 5e-3


@pytest.mark.parametrize("backend", EVERYWHERE)
@given(length=st.integers(2, 140), at=st.integers(1, 139))
def test_nothing_from_the_future(backend: str, length: int, at: int) -> None:
    at = at % length
    q, k, v = inputs(1, 2, 2, length)
    before = linear_attention(q, k, v, chunk_size=16, backend=backend).output
    for x in (q, k, v):
        x[:, :, at] = 7.0
    after = linear_attention(q, k, v, chunk_size=16, backend=backend).output
    assert torch.equal(before[:, :, :at], after[:, :, :at])


@pytest.mark.parametrize("backend", EVERYWHERE)
def test_a_query_like_no_key_gets_zero(backend: str) -> None:
    q, k, v = inputs(1, 1, 1, 9)
    output = linear_attention(torch.zeros_like(q), k, v, backend=backend).output
    assert torch.equal(output, torch.zeros_like(output))


def test_one_token_is_computed_recurrently_and_more_in_chunks() -> None:
    for length, backend in ((1, "recurrent"), (9, "chunked")):
        x = inputs(1, 1, 2, length)
        assert torch.equal(linear_attention(*x).output, linear_attention(*x, backend=backend).output)


def test_triton_is_optional_and_its_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "hf_effattn.ops.linear.kernels", raising=False)
    monkeypatch.delattr("hf_effattn.ops.linear.kernels", raising=False)
    with pytest.raises(ImportError, match=r"pip install 'hf_effattn\[triton\]'"):
        linear_attention(*inputs(1, 1, 1, 3), backend="triton")


def test_double_stays_double() -> None:
    output, state = linear_attention(*inputs(1, 1, 1, 70, dtype=torch.float64))
    assert output.dtype == state.kv.dtype == torch.float64


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"query": torch.rand(2, 6, 5)}, ValueError, r"expected query \[B,H,T,F\]"),
        ({"query": torch.rand(2, 3, 5, 6)}, ValueError, "multiple"),
        ({"query": torch.rand(2, 4, 7, 6)}, ValueError, "past comes as `state`"),
        ({"value": torch.rand(2, 2, 5, 4).double()}, TypeError, "differ in dtype"),
        ({"backend": "fused"}, ValueError, "valid: auto, reference, chunked, recurrent, triton"),
        ({"chunk_size": 0}, ValueError, "chunk_size must be at least 1"),
        ({"padding_mask": torch.ones(2, 5)}, TypeError, "must be boolean"),
        ({"padding_mask": torch.ones(2, 4).bool()}, ValueError, r"must be \[2, 5\]"),
        ({"state": LinearState.of(torch.rand(2, 2, 5, 4), torch.rand(2, 2, 5))}, ValueError, r"\[B,G,F,V\+1\]"),
    ],
)
def test_bad_input_is_named(change: dict[str, Any], error: type[Exception], message: str) -> None:
    good = {"query": torch.rand(2, 4, 5, 6), "key": torch.rand(2, 2, 5, 6), "value": torch.rand(2, 2, 5, 4)}
    with pytest.raises(error, match=message):
        linear_attention(**{**good, **change})
