"""Vertical lines and slashes: against a slow definition, whatever the cuts; what is read, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from matrix import through, tiny_model, tokens
from transformers import DynamicCache

from hf_effattn import SparseConfig
from hf_effattn.attention import Call, HeadGeometry, make_mechanism
from hf_effattn.selectors import VerticalSlash

SIZE, COLUMNS, DIAGONALS = 16, 3, 4
WIDTH = SIZE // 8


def mechanism(**changes: int) -> Any:
    options = {"block_size": SIZE, "num_columns": COLUMNS, "num_diagonals": DIAGONALS, **changes}
    return make_mechanism(SparseConfig(selector="vertical_slash", **options), HeadGeometry(4, 2, 8, 8))


def texts(batch: int, length: int) -> list[torch.Tensor]:
    return [torch.randn(batch, heads, length, 8) for heads in (4, 2, 2)]


def votes(q: torch.Tensor, k: torch.Tensor, start: int) -> tuple[dict[int, float], dict[int, float]]:
    """The mass of each column and of each distance, from the queries `[R, T, D]` before `start`."""
    columns: dict[int, float] = dict.fromkeys(range(start), 0.0)
    distances: dict[int, float] = dict.fromkeys(range(start), 0.0)
    for head in q:
        for t in range(start - WIDTH, start):
            weights = (k[: t + 1] @ head[t] * 8**-0.5).softmax(dim=0)
            for j, weight in enumerate(weights.tolist()):
                columns[j] += weight
                distances[t - j] += weight
    return columns, distances


def slow(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """The definition, for one key/value head: q `[R, T, D]`, k and v `[T, D]`, in float64."""
    q, k, v = q.double(), k.double(), v.double()
    outputs = torch.empty_like(q)
    for t in range(q.shape[1]):
        start = t - t % SIZE
        seen = set(range(start, t + 1))
        if start:
            columns, distances = votes(q, k, start)
            seen |= set(sorted(columns, key=lambda j: (-columns[j], j))[:COLUMNS])
            mass = [
                sum(distances.get(b * WIDTH + i, 0.0) for i in range(WIDTH)) for b in range((start + SIZE) // WIDTH)
            ]
            bands = [0, *sorted(range(1, len(mass)), key=lambda b: (-mass[b], b))][: DIAGONALS // WIDTH]
            seen |= {t - b * WIDTH - i for b in bands for i in range(WIDTH)} & set(range(start))
        chosen = sorted(seen)
        for r in range(q.shape[0]):
            outputs[r, t] = (k[chosen] @ q[r, t] * 8**-0.5).softmax(dim=0) @ v[chosen]
    return outputs


@given(length=st.integers(1, 70), piece=st.integers(1, 40), seed=st.integers(0, 99))
def test_fast_is_slow(length: int, piece: int, seed: int) -> None:
    torch.manual_seed(seed)
    net, (q, k, v) = mechanism(), texts(2, length)
    whole = net.attend(None, q, k, v, Call(8**-0.5, keep_state=False))[0]
    state, outputs = None, []
    for start in range(0, length, piece):
        part = (x[:, :, start : start + piece] for x in (q, k, v))
        output, state = net.attend(state, *part, Call(8**-0.5))
        outputs.append(output)
    torch.testing.assert_close(torch.cat(outputs, dim=2), whole, atol=1e-5, rtol=1e-5)
    for row in range(2):
        for head in range(2):
            expected = slow(q[row, 2 * head : 2 * head + 2], k[row, head], v[row, head])
            torch.testing.assert_close(whole[row, 2 * head : 2 * head + 2].double(), expected, atol=1e-5, rtol=1e-5)


def test_a_step_reads_what_was_chosen_only() -> None:
    torch.manual_seed(0)
    net, (q, k, v) = mechanism(), texts(1, 100)
    _, state = net.attend(None, q, k, v, Call(8**-0.5))
    new = [x[:, :, :1] for x in texts(1, 1)]
    expected, _ = net.attend(state, *new, Call(8**-0.5))
    read = set(range(96, 100)) | set(state.columns[0, 0].tolist())
    read |= {100 - band * WIDTH - i for band in state.bands[0, 0].tolist() for i in range(WIDTH)}
    assert len(read) <= net.num_visible(101)
    unread = [j for j in range(100) if j not in read]
    for each in (state.store.keys, state.store.values):
        each[:, 0, unread] = torch.nan
        each[:, 1] = 0.0
    actual, _ = net.attend(state, *new, Call(8**-0.5))
    assert torch.equal(actual[:, :2], expected[:, :2])


def test_planted_lines_are_found() -> None:
    torch.manual_seed(0)
    direction = torch.nn.functional.normalize(torch.randn(8), dim=0)
    key, query = 0.1 * torch.randn(1, 1, 64, 8), 0.1 * torch.randn(1, 1, 8, 8)
    key[0, 0, 20] = 30 * direction  # a column: every query wants key 20
    query += direction
    marks = torch.nn.functional.normalize(torch.randn(8, 8), dim=1)
    key[0, 0, 16:19], query[0, 0, 0:3] = 25 * marks[:3], query[0, 0, 0:3] + 2 * marks[:3]  # a diagonal, distance 40
    columns, bands = VerticalSlash(1, 16, 64).vote(query, key, 1.0)
    assert columns.tolist() == [[[20]]]
    assert sorted(bands[0, 0].tolist()) == [0, 40 // 8]


@torch.no_grad()
def test_enough_lines_are_softmax_attention() -> None:
    net, ids = tiny_model("llama-gqa"), tokens(2, 60)
    dense = net(ids).logits
    options = {"selector": "vertical_slash", "block_size": 16}
    net.convert_attention("sparse", num_columns=64, num_diagonals=2, **options)
    torch.testing.assert_close(net(ids).logits, dense, atol=1e-5, rtol=1e-5)
    net.convert_attention("sparse", num_columns=1, num_diagonals=64, **options)
    torch.testing.assert_close(net(ids).logits, dense, atol=1e-5, rtol=1e-5)
    net.convert_attention("sparse", num_columns=1, num_diagonals=2, **options)
    assert (net(ids).logits - dense).abs().max() > 1e-3


@torch.no_grad()
def test_bytes_are_those_of_the_report() -> None:
    net = tiny_model("llama-gqa").convert_attention(
        "sparse", selector="vertical_slash", block_size=16, num_columns=3, num_diagonals=4
    )
    cache = DynamicCache(config=net.config)
    for number in (40, 41, 60):
        net(tokens(2, number - cache.get_seq_length()), **through(cache))
        report = net.attention_report(context_length=number)
        for layer, record in zip(cache.layers, report.layers, strict=True):
            assert layer.nbytes() == 2 * record.cache_bytes


def test_what_does_not_work_says_so() -> None:
    for options, message in (
        ({"block_size": 12}, "block_size must be a multiple of 8; got 12"),
        (
            {"block_size": 16, "num_diagonals": 5},
            "num_diagonals must be a multiple of 2, an eighth of block_size; got 5",
        ),
        ({"num_columns": 0}, "num_columns must be at least 1; got 0"),
        ({"num_blocks": 4}, "num_blocks does not go with selector 'vertical_slash', which takes num_columns"),
        ({"backend": "gathered"}, "unknown backend 'gathered' of selector 'vertical_slash'; valid: auto"),
    ):
        with pytest.raises(ValueError, match=message):
            SparseConfig(selector="vertical_slash", **options)
    with pytest.raises(ValueError, match="num_columns does not go with selector 'quest'"):
        SparseConfig(selector="quest", num_columns=4)
    net = tiny_model("llama-gqa").convert_attention("sparse", selector="vertical_slash")
    with pytest.raises(ValueError, match="dynamic caches only"):
        net.generate(tokens(1, 12), max_new_tokens=4, cache_implementation="static")
    net.revert_attention()
    cache = DynamicCache()
    net(tokens(1, 12), **through(cache))
    net.convert_attention("sparse", selector="vertical_slash")
    with pytest.raises(ValueError, match="without the queries"):
        net(tokens(1, 1), **through(cache))
