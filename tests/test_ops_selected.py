"""Selected blocks: law 2 (fast = slow), law 3 (nothing from the future), what is chosen, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from matrix import tiny_model
from test_ops_linear import relative

from hf_effattn import SparseConfig
from hf_effattn.ops.selected import Selection, selected_attention, step
from hf_effattn.selectors import SELECTORS, BlockSelector

every_selector = pytest.mark.parametrize("name", list(SELECTORS))
BLOCK_SELECTORS = [name for name in SELECTORS if issubclass(SELECTORS.get(name), BlockSelector)]
every_block_selector = pytest.mark.parametrize("name", BLOCK_SELECTORS)
SIZE = 8


def inputs(name: str, batch: int, blocks: int, kv_heads: int = 2, groups: int = 3) -> list[torch.Tensor]:
    """Query, key and value of whole blocks, and the summary of the keys."""
    shape = (batch, kv_heads, blocks * SIZE)
    q, k, v = torch.randn(batch, kv_heads * groups, blocks * SIZE, 16), torch.randn(*shape, 16), torch.randn(*shape, 5)
    real = torch.ones(1, 1, blocks, SIZE, 1, dtype=torch.bool)
    return [q, k, v, SELECTORS.get(name)().summary(k.unflatten(2, (-1, SIZE)), real)]


@every_selector
def test_each_selector_names_its_paper_and_is_in_the_readme(name: str) -> None:
    assert "arXiv" in (SELECTORS.get(name).__doc__ or "")
    assert f"`{name}`" in (Path(__file__).parents[1] / "README.md").read_text()


@every_block_selector
@given(batch=st.integers(1, 3), blocks=st.integers(1, 12), first=st.integers(0, 95), number=st.integers(2, 6))
def test_fast_is_slow(name: str, batch: int, blocks: int, first: int, number: int) -> None:
    q, k, v, summary = inputs(name, batch, blocks)
    first = first % q.shape[2]
    q, positions = q[:, :, first:].requires_grad_(), torch.arange(first, q.shape[2])[None]
    leaves = [q, k.requires_grad_(), v.requires_grad_()]
    selection = Selection(SELECTORS.get(name)(), SIZE, number, 0.25)
    found = {}
    for backend in ("reference", "masked", "gathered"):
        output = selected_attention(*leaves, summary, positions, selection, backend)
        found[backend] = [output, *torch.autograd.grad(output.square().sum(), leaves)]
    for backend in ("masked", "gathered"):
        for index, (actual, expected) in enumerate(zip(found[backend], found["reference"], strict=True)):
            assert relative(actual, expected) <= (2e-6 if index else 1e-6), (backend, index)
    for at in range(q.shape[2]):
        one = step(q[:, :, at : at + 1], k, v, summary, positions[:, at : at + 1], selection)
        assert relative(one, found["reference"][0][:, :, at : at + 1]) <= 1e-6


@every_block_selector
def test_bfloat16_stays_within_its_rounding(name: str) -> None:
    q, k, v, summary = inputs(name, 1, 20)
    leaves = [x.bfloat16().requires_grad_() for x in (q, k, v)]
    selection, positions = Selection(SELECTORS.get(name)(), SIZE, 4, 0.25), torch.arange(160)[None]
    found = {}
    for backend in ("reference", "masked", "gathered"):
        output = selected_attention(*leaves, summary, positions, selection, backend)
        found[backend] = [output, *torch.autograd.grad(output.float().square().sum(), leaves)]
    for backend in ("masked", "gathered"):
        for index, (actual, expected) in enumerate(zip(found[backend], found["reference"], strict=True)):
            assert relative(actual, expected) <= (1e-2 if index else 6e-3), (backend, index)


@every_block_selector
def test_the_best_blocks_are_chosen(name: str) -> None:
    """A query that a planted block answers chooses it, beside the first block and its own."""
    q, k, _, _ = inputs(name, 1, 12, kv_heads=1, groups=2)
    planted = torch.randn(16)
    k[:, :, 5 * SIZE : 6 * SIZE] += 10 * planted
    q[:, 1] = planted  # the other head follows
    selector, real = SELECTORS.get(name)(), torch.ones(1, 1, 12, SIZE, 1, dtype=torch.bool)
    summary = selector.summary(k.unflatten(2, (-1, SIZE)), real)
    blocks = Selection(selector, SIZE, 3, 0.25).blocks(q, summary, torch.arange(96)[None])[0, 0]
    for position in range(96):
        own = position // SIZE
        chosen = {int(block) for block in blocks[position]} - {-1}
        assert {0, own} <= chosen <= set(range(own + 1))
        assert len(chosen) == min(3, own + 1)
        assert own <= 5 or 5 in chosen


@every_block_selector
def test_enough_blocks_are_softmax_attention(name: str) -> None:
    net, ids = tiny_model("llama-gqa"), torch.randint(3, 60, (2, 50))
    dense = net(ids).logits
    net.convert_attention("sparse", selector=name, block_size=8, num_blocks=7)
    torch.testing.assert_close(net(ids).logits, dense, atol=1e-5, rtol=1e-5)
    net.convert_attention("sparse", selector=name, block_size=8, num_blocks=2)
    assert (net(ids).logits - dense).abs().max() > 1e-3


def test_bad_options_are_named() -> None:
    for options, message in (
        ({"selector": "best"}, "unknown selector 'best'; valid: moba, quest, vertical_slash"),
        ({"selector": "quest", "block_size": 10}, "block_size must be one of 8, 16, .*; got 10"),
        ({"selector": "quest", "num_blocks": 1}, "num_blocks must be at least 2; got 1"),
        (
            {"selector": "quest", "window": 10},
            "window does not go with selector 'quest', which takes block_size, num_blocks",
        ),
        ({"selector": "quest", "pattern": "fixed"}, "pattern does not go with selector 'quest'"),
        ({"selector": "moba", "backend": "banded"}, "valid: auto, gathered, masked, reference"),
        ({"window": 8, "num_blocks": 4}, "'streaming' does not take .'num_blocks'."),
    ):
        with pytest.raises(ValueError, match=message):
            SparseConfig(**options)
    q, k, v, summary = inputs("quest", 1, 3)
    selection = Selection(SELECTORS.get("quest")(), SIZE, 2, 0.25)
    with pytest.raises(ValueError, match="23 keys are not 3 blocks of 8"):
        selected_attention(q, k[:, :, 1:], v[:, :, 1:], summary, torch.arange(24)[None], selection)
    with pytest.raises(ValueError, match="unknown backend 'fast'"):
        selected_attention(q, k, v, summary, torch.arange(24)[None], selection, "fast")


@every_block_selector
def test_a_decoding_step_reads_the_chosen_blocks_only(name: str) -> None:
    q, k, v, summary = inputs(name, 2, 20)
    selection, position = Selection(SELECTORS.get(name)(), SIZE, 4, 0.25), torch.full((1, 1), 155)
    query = q[:, :, 155:156]
    expected = step(query, k, v, summary, position, selection)
    blocks = selection.blocks(query, summary, position)
    chosen = (torch.arange(160) // SIZE == blocks[..., None]).any(dim=3)[:, :, 0]  # [B, G, S]
    assert chosen.sum(dim=2).eq(4 * SIZE).all()
    k, v = (x.masked_fill(~chosen[..., None], torch.nan) for x in (k, v))
    assert torch.equal(step(query, k, v, summary, position, selection), expected)
