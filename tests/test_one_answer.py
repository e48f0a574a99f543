"""Law 1: one answer however the tokens come. Law 6: neighbours and padding don't matter."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from matrix import (
    MODELS,
    OF_FOUR_HEADS,
    ONE_STATE_EACH,
    PAIRS,
    Case,
    close,
    converted_model,
    left_padded,
    positions_of,
    shake,
    through,
    tiny_model,
    tokens,
)
from transformers import DynamicCache

everywhere = pytest.mark.parametrize(("model", "case"), PAIRS, ids=str)
every_state = pytest.mark.parametrize("case", ONE_STATE_EACH, ids=str)
on_every_model = pytest.mark.parametrize("model", MODELS)

lengths = st.integers(1, 40)


def cuts(total: int, at: list[int]) -> list[tuple[int, int]]:
    edges = sorted({0, total, *(cut % total for cut in at)})
    return list(zip(edges[:-1], edges[1:], strict=True))


def forward(model: torch.nn.Module, ids: torch.Tensor, **kwargs: object) -> torch.Tensor:
    with torch.no_grad():
        return model(ids, **kwargs).logits


def chunked_prefill(net: Any, ids: torch.Tensor, mask: torch.Tensor, at: list[int]) -> torch.Tensor:
    """Logits of padded rows that come in chunks, through one cache."""
    positions, cache = positions_of(mask), DynamicCache(config=net.config)
    chunks = [
        forward(net, ids[:, a:b], attention_mask=mask[:, :b], position_ids=positions[:, a:b], **through(cache))
        for a, b in cuts(ids.shape[1], at)
    ]
    return torch.cat(chunks, dim=1)


@everywhere
@given(length=lengths, at=st.lists(st.integers(0, 39), max_size=4), empty_cache=st.booleans())
def test_chunked_prefill_is_full_forward(model: str, case: Case, length: int, at: list[int], empty_cache: bool) -> None:
    net, ids = converted_model(model, case), tokens(2, length)
    cache = DynamicCache() if empty_cache else DynamicCache(config=net.config)
    parts = [forward(net, ids[:, a:b], **through(cache)) for a, b in cuts(length, at)]
    close(torch.cat(parts, dim=1), forward(net, ids, use_cache=False))


@everywhere
def test_token_by_token_is_full_forward(model: str, case: Case) -> None:
    net, ids = converted_model(model, case), tokens(2, 24)
    cache = DynamicCache(config=net.config)
    parts = [forward(net, ids[:, t : t + 1], **through(cache)) for t in range(24)]
    close(torch.cat(parts, dim=1), forward(net, ids, use_cache=False))


@everywhere
@given(
    sizes=st.lists(lengths, min_size=2, max_size=4), at=st.lists(st.integers(0, 39), max_size=3), seed=st.integers(0, 9)
)
def test_left_padded_rows_are_themselves(model: str, case: Case, sizes: list[int], at: list[int], seed: int) -> None:
    net = converted_model(model, case)
    rows = [tokens(size, seed=seed + index) for index, size in enumerate(sizes)]
    ids, mask = left_padded(rows)
    positions = positions_of(mask)
    together = forward(net, ids, attention_mask=mask, position_ids=positions, use_cache=False)
    chunked = chunked_prefill(net, ids, mask, at)
    for index, row in enumerate(rows):
        alone = forward(net, row[None], use_cache=False)[0]
        close(together[index, -len(row) :], alone)
        close(chunked[index, -len(row) :], alone)


@every_state
@on_every_model
@given(
    first=st.lists(st.integers(1, 9), min_size=2, max_size=2),
    second=st.lists(st.integers(1, 9), min_size=2, max_size=2),
)
def test_padding_between_turns_is_invisible(model: str, case: Case, first: list[int], second: list[int]) -> None:
    """Two turns of a batched conversation, each padded on the left, then two decoding steps."""
    net = converted_model(model, case)
    turns = [
        [tokens(size, seed=5 * turn + i) for i, size in enumerate(sizes)] for turn, sizes in enumerate((first, second))
    ]
    steps = tokens(2, 2, seed=99)
    parts = [left_padded(turn) for turn in turns] + [(steps[:, i : i + 1], torch.ones(2, 1).long()) for i in range(2)]
    cache = DynamicCache(config=net.config)
    mask = torch.zeros(2, 0, dtype=torch.long)
    for ids, real in parts:
        mask = torch.cat((mask, real), dim=1)
        positions = positions_of(mask)[:, -ids.shape[1] :]
        logits = forward(net, ids, attention_mask=mask, position_ids=positions, **through(cache))
    for index in range(2):
        row = torch.cat((turns[0][index], turns[1][index], steps[index]))
        close(logits[index, -1], forward(net, row[None], use_cache=False)[0, -1])


@everywhere
@given(size=lengths, padding=st.integers(1, 9))
def test_right_padding_is_invisible(model: str, case: Case, size: int, padding: int) -> None:
    net, row = converted_model(model, case), tokens(1, size)
    ids = torch.cat((row, tokens(1, padding, seed=3)), dim=1)
    mask = (torch.arange(size + padding) < size).long()[None]
    close(forward(net, ids, attention_mask=mask, use_cache=False)[:, :size], forward(net, row, use_cache=False))


@everywhere
@given(sizes=st.lists(st.lists(st.integers(1, 14), min_size=1, max_size=4), min_size=1, max_size=2))
def test_packed_documents_do_not_see_each_other(model: str, case: Case, sizes: list[list[int]]) -> None:
    net = converted_model(model, case)
    total = max(sum(row) for row in sizes)
    sizes = [[*row[:-1], row[-1] + total - sum(row)] for row in sizes]
    ids = tokens(len(sizes), total)
    positions = torch.stack([torch.cat([torch.arange(size) for size in row]) for row in sizes])
    packed = forward(net, ids, position_ids=positions, use_cache=False)
    for index, row in enumerate(sizes):
        start = 0
        for size in row:
            alone = forward(net, ids[index : index + 1, start : start + size], use_cache=False)
            close(packed[index, start : start + size], alone[0])
            start += size


@every_state
@on_every_model
@given(length=st.integers(2, 30), order=st.permutations([0, 1, 2]))
def test_beams_can_be_reordered(model: str, case: Case, length: int, order: list[int]) -> None:
    net, ids, more = converted_model(model, case), tokens(3, length), tokens(3, 3, seed=1)
    cache = DynamicCache(config=net.config)
    forward(net, ids, **through(cache))
    cache.reorder_cache(torch.tensor(order))
    after = torch.cat([forward(net, more[:, t : t + 1], **through(cache)) for t in range(3)], dim=1)
    close(after, forward(net, torch.cat((ids[order], more), dim=1), use_cache=False)[:, length:])


@every_state
@on_every_model
@given(prompt=st.integers(1, 20), draft=st.integers(1, 8), rejected=st.integers(0, 8), split=st.booleans())
def test_rolled_back_tokens_were_never_there(
    model: str, case: Case, prompt: int, draft: int, rejected: int, split: bool
) -> None:
    rejected = min(rejected, draft)
    net, ids, more = converted_model(model, case), tokens(2, prompt + draft), tokens(2, 5, seed=1)
    cache = DynamicCache(config=net.config)
    cache.activate_past_recording()
    forward(net, ids[:, :prompt], **through(cache))
    cache.crop(0)
    pieces = [1] * draft if split else [draft]
    start = prompt
    for size in pieces:
        forward(net, ids[:, start : start + size], **through(cache))
        start += size
    cache.crop(-rejected)
    kept = ids[:, : prompt + draft - rejected]
    assert cache.get_seq_length() == kept.shape[1]
    after = torch.cat([forward(net, more[:, :3], **through(cache)), forward(net, more[:, 3:], **through(cache))], dim=1)
    close(after, forward(net, torch.cat((kept, more), dim=1), use_cache=False)[:, kept.shape[1] :])


@pytest.mark.parametrize("case", OF_FOUR_HEADS, ids=str)
@on_every_model
def test_cache_can_be_repeated_selected_reset_and_copied(model: str, case: Case) -> None:
    net, ids, more = converted_model(model, case), tokens(2, 15), tokens(4, 1, seed=1)
    cache = DynamicCache(config=net.config)
    forward(net, ids, **through(cache))
    cache.batch_repeat_interleave(2)
    twin = copy.deepcopy(cache)
    expected = forward(net, torch.cat((ids.repeat_interleave(2, 0), more), dim=1), use_cache=False)[:, -1:]
    close(forward(net, more, **through(cache)), expected)
    twin.batch_select_indices(torch.tensor([3, 0]))
    close(forward(net, more[[3, 0]], **through(twin)), expected[[3, 0]])
    cache.reset()
    assert cache.get_seq_length() == 0
    close(forward(net, ids, **through(cache)), forward(net, ids, use_cache=False))


@pytest.mark.parametrize("layers", [[0], [1], None], ids=["first", "last", "all"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("case", OF_FOUR_HEADS, ids=str)
@on_every_model
@given(sizes=st.lists(lengths, min_size=2, max_size=3), at=st.lists(st.integers(0, 39), max_size=3))
def test_native_masks_are_understood(
    model: str, case: Case, implementation: str, layers: list[int] | None, sizes: list[int], at: list[int]
) -> None:
    """Models that keep a softmax layer, or whose implementation was set, give converted layers transformers' masks."""
    net = shake(tiny_model(model).convert_attention(case.mechanism, layers=layers, **case.options))
    net.set_attn_implementation(implementation)
    rows = [tokens(size, seed=index) for index, size in enumerate(sizes)]
    ids, mask = left_padded(rows)
    chunked = chunked_prefill(net, ids, mask, at)
    for index, row in enumerate(rows):
        close(chunked[index, -len(row) :], forward(net, row[None], use_cache=False)[0])
