"""The sparse operation: law 2 (fast = slow), law 3 (nothing from the future), and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matrix import patterns
from test_ops_linear import relative

from hf_effattn.ops.sparse import BACKENDS, choose_backend, flash, single, sparse_attention
from hf_effattn.ops.sparse.jobs import Places, every_of, jobs_of
from hf_effattn.patterns import Pattern, fixed, sliding_window, streaming, strided

ALL = {**patterns(), "long": streaming(300, 4), "wide": streaming(70, 9), "blocks": fixed(64, 3)}
ALL["every key"] = sliding_window((None,))


def pairs() -> list[tuple[str, str]]:
    found = []
    for name, pattern in ALL.items():
        for backend in sorted({*BACKENDS} - {"flex"}):  # without gradients on a CPU: see test_flex
            try:
                found.append((name, choose_backend(pattern, backend)))
            except ValueError:
                continue
    return found


PAIRS = pairs()
FAST = [pair for pair in PAIRS if pair[1] != "reference"]


def heads_for(name: str, kv_heads: int, groups: int) -> tuple[int, int]:
    """Key/value heads and queries of each, as the pattern wants them."""
    wanted = ALL[name].num_heads
    return (kv_heads, groups) if wanted is None else (wanted // 2, 2)


def inputs(batch: int, kv_heads: int, groups: int, length: int, past: int = 0, **options: Any) -> list[torch.Tensor]:
    """Query, key and value in the layout of a projection, `[B, T, H, D]` seen as `[B, H, T, D]`."""
    shapes = ((length, kv_heads * groups, 8), (past + length, kv_heads, 8), (past + length, kv_heads, 5))
    return [torch.randn(batch, *shape, **options).transpose(1, 2) for shape in shapes]


@pytest.mark.parametrize(("name", "backend"), FAST)
@settings(max_examples=12)
@given(
    batch=st.integers(1, 3),
    kv_heads=st.integers(1, 2),
    groups=st.integers(1, 3),
    length=st.integers(1, 150) | st.just(600),
    past=st.integers(0, 90),
    padding=st.sampled_from(["none", "left", "holes"]),
)
def test_fast_is_slow(
    name: str, backend: str, batch: int, kv_heads: int, groups: int, length: int, past: int, padding: str
) -> None:
    torch.manual_seed(length)
    q, k, v = inputs(batch, *heads_for(name, kv_heads, groups), length, past)
    mask = None
    if padding != "none":
        mask = torch.rand(batch, past + length) > 0.3
        if padding == "left":
            mask = torch.arange(past + length) >= torch.randint(0, past + length, (batch, 1))
    options = {"query_offset": past, "padding_mask": mask}
    expected = sparse_attention(q, k, v, ALL[name], backend="reference", **options)
    actual = sparse_attention(q, k, v, ALL[name], backend=backend, **options)
    if mask is not None:
        real = mask[:, None, past:, None]
        actual, expected = actual * real, expected * real
    assert actual.isfinite().all()
    assert relative(actual, expected) <= 1e-6


@pytest.mark.parametrize(("name", "backend"), FAST)
def test_gradients_are_those_of_the_reference(name: str, backend: str) -> None:
    leaves = [x.requires_grad_() for x in inputs(2, *heads_for(name, 2, 3), 130)]
    weight = torch.randn(2, leaves[0].shape[1], 130, 5)
    gradients = {
        each: torch.autograd.grad((sparse_attention(*leaves, ALL[name], backend=each) * weight).sum(), leaves)
        for each in ("reference", backend)
    }
    for actual, expected in zip(gradients[backend], gradients["reference"], strict=True):
        assert actual.isfinite().all()
        assert relative(actual, expected) <= 2e-6


@pytest.mark.parametrize("name", [name for name, backend in FAST if backend == "gathered"])
def test_an_operator_that_knows_no_grouped_heads(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's before 2.9 reads and writes past the end of fewer key/value heads."""
    for position, each in enumerate(("_FORWARD", "_BACKWARD")):  # of the query; the key follows
        operator = getattr(flash, each)

        def checked(*args: Any, position: int = position, operator: Any = operator, **kwargs: Any) -> Any:
            assert args[position].shape[1] == args[position + 1].shape[1]
            return operator(*args, **kwargs)

        monkeypatch.setattr(flash, each, checked)
    monkeypatch.setattr(flash, "KNOWS_GROUPS", False)
    assert flash.is_available.__wrapped__()
    test_gradients_are_those_of_the_reference(name, "gathered")


@pytest.mark.parametrize(("name", "backend"), FAST)
def test_bfloat16_stays_within_its_rounding(name: str, backend: str) -> None:
    leaves = [x.bfloat16().requires_grad_() for x in inputs(1, *heads_for(name, 2, 3), 200)]
    weight = torch.randn(1, leaves[0].shape[1], 200, 5)
    results = {}
    for each in ("reference", backend):
        output = sparse_attention(*leaves, ALL[name], backend=each)
        assert output.dtype == torch.bfloat16
        results[each] = [output, *torch.autograd.grad((output.float() * weight).sum(), leaves)]
    for index, (actual, expected) in enumerate(zip(results[backend], results["reference"], strict=True)):
        assert relative(actual, expected) <= (1e-2 if index else 6e-3)


@pytest.mark.parametrize(("name", "backend"), PAIRS)
@given(length=st.integers(2, 140), at=st.integers(1, 139))
def test_nothing_from_the_future(name: str, backend: str, length: int, at: int) -> None:
    at = at % length
    q, k, v = inputs(1, *heads_for(name, 2, 2), length)
    before = sparse_attention(q, k, v, ALL[name], backend=backend)
    for x in (q, k, v):
        x[:, :, at] = 7.0
    after = sparse_attention(q, k, v, ALL[name], backend=backend)
    assert torch.equal(before[:, :, :at], after[:, :, :at])


@pytest.mark.parametrize("name", [name for name, pattern in ALL.items() if pattern.parts])
@given(
    position=st.integers(0, 150) | st.just(599), batch=st.integers(1, 2), dtype=st.sampled_from(["float32", "bfloat16"])
)
def test_a_single_query_reads_what_it_sees_and_nothing_else(name: str, position: int, batch: int, dtype: str) -> None:
    q, k, v = (x.to(getattr(torch, dtype)) for x in inputs(batch, *heads_for(name, 2, 2), 1, position))
    expected = sparse_attention(q, k, v, ALL[name], query_offset=position, backend="reference")
    index = torch.arange(position + 1)[None]
    seen = ALL[name].visible(index[:, -1:], index, q.shape[1]).any(dim=1)[0, 0]
    first = seen | (index[0] == 0)  # which stands for keys that only some heads have
    more = [torch.cat((x.masked_fill(~first[:, None], torch.nan), x[:, :, :3] * torch.nan), dim=2) for x in (k, v)]
    actual = single.sparse_attention(q, *more, ALL[name], position, 8**-0.5)
    assert actual.dtype == expected.dtype
    assert relative(actual, expected) <= (1e-6 if dtype == "float32" else 1e-2)


@pytest.mark.parametrize("backend", ["reference", "masked"])
def test_a_blind_query_gets_zero(backend: str) -> None:
    pattern = ALL["sinks"] & ALL["sliding_window"]  # from position 7 on nothing is both recent and a sink
    output = sparse_attention(*inputs(1, 1, 1, 20), pattern, backend=backend)
    assert torch.equal(output[:, :, 8:], torch.zeros_like(output[:, :, 8:]))
    assert output[:, :, :2].abs().sum() > 0


@pytest.mark.parametrize(("part", "most"), [(0, 5), (1, 2)])
def test_blocks_that_are_alike_are_computed_together(part: int, most: int) -> None:
    """Of a strided pattern 16 blocks of a window, the first of them with fewer keys, and 64 classes of columns."""
    query, index = torch.empty(1, 2, 1024, 8), torch.arange(1024)[None, None, :, None]
    own = strided(64).parts[part]
    jobs = list(jobs_of(own, query, Places(), every_of(own, query, Places()), True))
    assert len(jobs) <= most
    found = torch.cat([job.queries.view(index).flatten() for job in jobs])
    assert torch.equal(found.sort().values, index.flatten())
    assert len({job.hidden.data_ptr() for job in jobs if job.hidden is not None}) <= most


def test_no_queries_give_no_output() -> None:
    for name, backend in PAIRS:
        q, k, v = inputs(2, *heads_for(name, 2, 3), 0, past=5)
        output = sparse_attention(q, k, v, ALL[name], query_offset=5, backend=backend)
        assert output.shape == (2, q.shape[1], 0, 5)


def test_auto_prefers_the_band() -> None:
    assert choose_backend(streaming(8)) == "banded"
    assert choose_backend(strided(8)) == "gathered"
    assert choose_backend(strided(8), device="cuda") == "masked"


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"query": torch.rand(2, 6, 5)}, ValueError, r"expected query \[B,H,T,D\]"),
        ({"query": torch.rand(2, 3, 5, 6)}, ValueError, "multiple"),
        ({"query_offset": 2}, ValueError, "query_offset"),
        ({"backend": "flash"}, ValueError, "valid: auto, reference, masked, banded"),
        ({"backend": "banded", "pattern": strided(3)}, ValueError, "not strided"),
        ({"padding_mask": torch.ones(2, 5)}, TypeError, "must be boolean"),
    ],
)
def test_bad_input_is_named(change: dict[str, Any], error: type[Exception], message: str) -> None:
    good = {"query": torch.rand(2, 4, 5, 6), "key": torch.rand(2, 2, 5, 6), "value": torch.rand(2, 2, 5, 4)}
    options: dict[str, Any] = {**good, "pattern": streaming(3), **change}
    pattern: Pattern = options.pop("pattern")
    with pytest.raises(error, match=message):
        sparse_attention(options.pop("query"), options.pop("key"), options.pop("value"), pattern, **options)
