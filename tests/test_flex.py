"""Sparse attention by FlexAttention: it is the reference, on a CPU without its compiler (but for the slow test)."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from matrix import close, left_padded, patterns, positions_of, through, tiny_model, tokens
from test_ops_linear import relative
from test_ops_sparse import ALL, heads_for, inputs
from torch.nn.attention import flex_attention as torch_flex
from torch.torch_version import TorchVersion
from transformers import DynamicCache

from hf_effattn.ops.sparse import choose_backend, flex, sparse_attention
from hf_effattn.patterns import Pattern, bigbird, sliding_window, streaming, strided

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
everywhere = pytest.mark.parametrize("device", DEVICES)
of_all_patterns = pytest.mark.parametrize("name", ALL)


@pytest.fixture(autouse=True)
def _no_compiler(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Kernels only on CUDA: building one on a CPU takes ten seconds."""
    flex.block_mask.cache_clear()
    if "gpu" in request.keywords or "slow" in request.keywords:
        yield
        return

    def eager(kind: Any, scale: float, dynamic: bool) -> Callable[..., Any]:
        call = functools.partial(torch_flex.flex_attention, scale=scale, enable_gqa=True)
        return lambda query, key, value, blocks: call(query, key, value, block_mask=blocks)

    monkeypatch.setattr(torch_flex, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True, raising=False)
    monkeypatch.setattr(flex, "compiled", eager)
    yield


def both(pattern: Pattern, tensors: list[torch.Tensor], **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """What flex computes, and the reference."""
    actual, expected = (sparse_attention(*tensors, pattern, backend=each, **options) for each in ("flex", "reference"))
    return actual, expected


@everywhere
@of_all_patterns
@pytest.mark.parametrize(
    ("length", "past", "padding"),
    [(1, 0, "none"), (128, 0, "none"), (300, 0, "holes"), (40, 131, "none"), (140, 20, "left")],
)
@torch.no_grad()
def test_flex_is_the_reference(name: str, length: int, past: int, padding: str, device: str) -> None:
    mask = None
    if padding != "none":
        mask = torch.rand(2, past + length) > 0.3
        if padding == "left":
            mask = torch.arange(past + length) >= torch.tensor([[9], [past + 50]])
        mask = mask.to(device)
    tensors = [x.to(device) for x in inputs(2, *heads_for(name, 2, 3), length, past)]
    actual, expected = both(ALL[name], tensors, query_offset=past, padding_mask=mask)
    if mask is not None:
        real = mask[:, None, past:, None]
        actual, expected = actual * real, expected * real
    assert actual.isfinite().all()
    assert relative(actual, expected) <= 1e-6


@everywhere
@of_all_patterns
@torch.no_grad()
def test_bfloat16_stays_within_its_rounding(name: str, device: str) -> None:
    actual, expected = both(ALL[name], [x.to(device, torch.bfloat16) for x in inputs(1, *heads_for(name, 2, 3), 200)])
    assert actual.dtype == torch.bfloat16
    assert relative(actual, expected) <= 6e-3


@pytest.mark.gpu
@of_all_patterns
@pytest.mark.parametrize(("length", "past"), [(256, 0), (130, 0), (70, 60)])
def test_gradients_are_those_of_the_reference(name: str, length: int, past: int) -> None:
    leaves = [x.cuda().requires_grad_() for x in inputs(2, *heads_for(name, 2, 3), length, past)]
    outputs = both(ALL[name], leaves, query_offset=past)
    weight = torch.randn_like(outputs[0])
    gradients = [torch.autograd.grad((output * weight).sum(), leaves) for output in outputs]
    for actual, expected in zip(*gradients, strict=True):
        assert actual.isfinite().all()
        assert relative(actual, expected) <= 2e-6


@everywhere
@torch.no_grad()
def test_a_blind_query_gets_zero(device: str) -> None:
    pattern = ALL["sinks"] & ALL["sliding_window"]  # from position 7 on nothing is both recent and a sink
    output = sparse_attention(*(x.to(device) for x in inputs(1, 1, 1, 300)), pattern, backend="flex")
    assert torch.equal(output[:, :, 8:], torch.zeros_like(output[:, :, 8:]))
    assert output[:, :, :2].abs().sum() > 0


@everywhere
@of_all_patterns
@torch.no_grad()
def test_nothing_from_the_future(name: str, device: str) -> None:
    tensors = [x.to(device) for x in inputs(1, *heads_for(name, 2, 2), 140)]
    before = sparse_attention(*tensors, ALL[name], backend="flex")
    for x in tensors:
        x[:, :, 100] = 7.0
    after = sparse_attention(*tensors, ALL[name], backend="flex")
    assert torch.equal(before[:, :, :100], after[:, :, :100])


@everywhere
@pytest.mark.parametrize("name", patterns())
@torch.no_grad()
def test_chunks_of_padded_rows_give_one_answer(name: str, device: str) -> None:
    """Through a model and its cache, whose slots are in the order of a ring."""
    rows = [tokens(size, seed=size) for size in (7, 30, 19)]
    dense = tiny_model("llama-gqa").convert_attention("sparse", pattern=patterns()[name], backend="reference")
    expected = [dense(row[None], use_cache=False).logits[0] for row in rows]
    net = tiny_model("llama-gqa").convert_attention("sparse", pattern=patterns()[name], backend="flex").to(device)
    ids, mask = (x.to(device) for x in left_padded(rows))
    for at in ((0, 30), (0, 14, 15, 30)):
        cache = DynamicCache(config=net.config)
        parts = [
            net(ids[:, a:b], attention_mask=mask[:, :b], position_ids=positions_of(mask)[:, a:b], **through(cache))
            for a, b in zip(at[:-1], at[1:], strict=True)
        ]
        logits = torch.cat([part.logits for part in parts], dim=1).cpu()
        for index, row in enumerate(rows):
            close(logits[index, -len(row) :], expected[index], 1e-5 if device == "cpu" else 1e-4)


def test_masks_are_kept_and_patterns_by_hand_told_apart() -> None:
    def seen(pattern: Pattern) -> torch.Tensor:
        with torch.no_grad():
            return sparse_attention(*tensors, pattern, backend="flex")

    tensors = inputs(1, 2, 2, 150)
    own, other = (Pattern(sliding_window(window).mask_mod) for window in (3, 9))
    assert own == other
    assert not torch.equal(seen(own), seen(other))
    assert flex.block_mask.cache_info().currsize == 2
    first = seen(streaming(5))
    assert torch.equal(first, seen(streaming(5)))
    assert flex.block_mask.cache_info().hits == 1
    for window in range(1, flex.KEPT_MASKS + 2):
        flex.block_mask(sliding_window(window), None, 1, 1, 1, 0, None, "cpu")
    assert flex.block_mask.cache_info().currsize == flex.KEPT_MASKS


@pytest.mark.skipif(TorchVersion(torch.__version__) < "2.7", reason="its eager FlexAttention fails in inference mode")
def test_masks_made_in_inference_mode_serve_elsewhere() -> None:
    with torch.inference_mode():
        sparse_attention(*inputs(1, 2, 2, 150), bigbird(4), backend="flex")
    blocks = flex.block_mask(bigbird(4), None, 4, 150, 150, 0, None, "cpu").blocks
    assert flex.block_mask.cache_info().hits == 1
    assert not blocks.kv_indices.is_inference()


@pytest.mark.parametrize("name", ALL)
def test_blocks_are_those_of_the_pattern(name: str) -> None:
    """Blocks that kernels skip show nothing, and those that they take as a whole show everything."""
    pattern, heads = ALL[name], ALL[name].num_heads or 4
    blocks = flex.block_mask(pattern, None, heads, 400, 700, 300, None, "cpu").blocks
    index = torch.arange(700)[None]
    visible = pattern.visible(index[:, 300:], index, heads).expand(1, heads, -1, -1)
    shown = torch.nn.functional.pad(visible, (0, 68, 0, 112)).unflatten(3, (6, 128)).unflatten(2, (4, 128))
    counts = shown.sum(dim=(3, 5))  # [1, H, 4, 6]
    for wanted, number, columns in (
        ((counts > 0) & (counts < 128**2), blocks.kv_num_blocks, blocks.kv_indices),
        (counts == 128**2, blocks.full_kv_num_blocks, blocks.full_kv_indices),
    ):
        assert number is not None
        assert columns is not None
        found = torch.zeros_like(wanted[:, : columns.shape[1]])
        listed = torch.arange(6) < number[..., None]
        found.scatter_(3, columns.long(), listed)
        assert torch.equal(found.expand_as(wanted), wanted)


def test_kernels_compute_what_32_bits_hold_and_look_up_the_rest() -> None:
    def looked_up(pattern: Pattern) -> bool:
        return flex.block_mask(pattern, None, 4, 150, 150, 0, None, "cpu").program[0] == "looked up"

    assert not looked_up(streaming(6, 2))
    assert not looked_up(strided(5) | streaming(6))
    assert looked_up(bigbird(4))
    assert looked_up(sliding_window((2, 3, 4, 5)))
    assert looked_up(streaming(2**40))


def test_what_flex_cannot_do_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"no gradients on a CPU; use 'auto', 'banded', 'gathered' or 'masked'"):
        sparse_attention(*(x.requires_grad_() for x in inputs(1, 2, 2, 9)), streaming(3), backend="flex")
    with pytest.raises(ValueError, match="not on 'mps'"):
        choose_backend(streaming(3), "flex", "mps")
    net = tiny_model("llama-gqa").convert_attention("sparse", window=4, backend="flex")
    for module in net.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.1
    with torch.no_grad(), pytest.raises(ValueError, match="'flex' has no attention dropout"):
        net.train()(tokens(1, 9))


def test_auto_never_is_flex() -> None:
    for pattern in (*ALL.values(), dataclasses.replace(strided(3), parts=())):
        assert {choose_backend(pattern, device=device) for device in ("cpu", "cuda")} <= {
            "banded",
            "gathered",
            "masked",
        }


@pytest.mark.slow
@torch.no_grad()
def test_compiled_flex_is_the_reference() -> None:
    for pattern in (streaming(40, 4), bigbird(16, 2), ALL["sinks"] & ALL["sliding_window"]):
        for past in (0, 45):
            actual, expected = both(pattern, inputs(2, 3, 3, 300, past), query_offset=past)
            assert relative(actual, expected) <= 1e-6
