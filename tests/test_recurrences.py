"""Recurrences with decay: fast = slow, with maps, padding, a past and gradients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from matrix import tiny_model
from test_ops_linear import relative

from hf_effattn.feature_maps import FEATURE_MAPS
from hf_effattn.ops.hybrid import HybridOptions, hybrid_attention
from hf_effattn.ops.linear import LinearState, empty_state, linear_attention
from hf_effattn.ops.linear.segment import Decay, factor_of
from hf_effattn.ops.stream import Stream
from hf_effattn.recurrences import RECURRENCES, Recurrence, RecurrenceShape

every_recurrence = pytest.mark.parametrize("name", list(RECURRENCES))


def shaken(name: str) -> Recurrence:
    """A recurrence of 6 query and 2 key/value heads of 16 dimensions, its parameters away from their start."""
    recurrence = RECURRENCES.get(name)(RecurrenceShape(6, 2, 16, 16, 24))
    with torch.no_grad():
        for parameter in recurrence.parameters():
            parameter.add_(torch.randn(parameter.shape))
    return recurrence


def with_gates(recurrence: Recurrence, key: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    """Keys, and behind them what the recurrence reads from the layer's input."""
    return torch.cat((key, recurrence.read_hidden(hidden)), dim=-1) if recurrence.num_gates else key + 0 * hidden.sum()


def gradients(loss: torch.Tensor, leaves: list[torch.Tensor], recurrence: Recurrence) -> list[torch.Tensor]:
    """Gradients of leaves, and last that of all parameters as one vector: in a parameter of one number for each head
    what tokens add may cancel out, so that its own relative error tells of the machine's rounding."""
    learned = list(recurrence.parameters())
    found = torch.autograd.grad(loss, [*leaves, *learned], retain_graph=True)
    of_parameters = [torch.cat([x.flatten() for x in found[len(leaves) :]])] if learned else []
    return [*found[: len(leaves)], *of_parameters]


def test_a_map_of_the_wrong_size_is_named() -> None:
    net = tiny_model("llama-gqa")
    with pytest.raises(ValueError, match="'liger' gates each dimension.*such as 'softmax'"):
        net.convert_attention("linear", recurrence="liger")
    with pytest.raises(ValueError, match="unknown recurrence 'rwkv'; valid: sum, delta, gated_delta, gla, liger"):
        net.convert_attention("linear", recurrence="rwkv")
    assert not any(hasattr(module, "effattn") for module in net.modules())


@every_recurrence
def test_each_recurrence_names_its_paper_and_is_in_the_readme(name: str) -> None:
    assert "arXiv" in (RECURRENCES.get(name).__doc__ or "")
    assert f'`"{name}"`' in (Path(__file__).parents[1] / "README.md").read_text()


@pytest.mark.parametrize("past", [False, True])
@pytest.mark.parametrize("length", [40, 300])
@every_recurrence
def test_behind_a_window_fast_is_slow(name: str, length: int, past: bool) -> None:
    torch.manual_seed(length)
    make = FEATURE_MAPS.get("softmax")
    recurrence, bias = shaken(name), torch.randn(6)
    o = HybridOptions(make(16, 6), make(16, 2), bias, 9, 2, 0.25, 16, recurrence=recurrence)
    leaves = [torch.randn(2, heads, length, dim, requires_grad=True) for heads, dim in ((6, 16), (2, 16), (2, 5))]
    leaves.append(torch.randn(2, length, 24, requires_grad=True))
    key = with_gates(recurrence, leaves[1], leaves[3])
    state, stream, lengths = empty_state(2, 2, 16, 5, like=bias), Stream(key, leaves[2]), None
    if past:
        before = [torch.randn(2, 2, 9, dim) for dim in (key.shape[3], 5)]
        sinks = [torch.randn(2, 2, 2, dim) for dim in (key.shape[3], 5)]
        keys, values = (torch.cat((x, y), dim=2) for x, y in zip(before, (key, leaves[2]), strict=True))
        stream = Stream(keys, values, torch.tensor([-3, 40]), -3, *sinks)
        state, lengths = LinearState(torch.rand(2, 2, 16, 6)), torch.tensor([length, length - 7])
    found = {}
    for backend in ("reference", "chunked"):
        output, new = hybrid_attention(leaves[0], stream, state, o, lengths=lengths, backend=backend)
        if past:
            output = output * (torch.arange(length) < lengths[:, None])[:, None, :, None]
        loss = output.square().sum() + new.sums.square().mean()
        found[backend] = [output, new.sums, *gradients(loss, leaves, recurrence)]
    for index, (actual, expected) in enumerate(zip(found["chunked"], found["reference"], strict=True)):
        assert relative(actual, expected) <= (2e-6 if index > 1 else 1e-6), index


@pytest.mark.parametrize("scale", [1.0, 30.0])
@pytest.mark.parametrize("length", [1, 40, 600])
@every_recurrence
def test_fast_is_slow(name: str, length: int, scale: float) -> None:
    torch.manual_seed(length)
    make = FEATURE_MAPS.get("softmax")
    maps = make(16, 6), make(16, 2)
    recurrence = shaken(name)
    leaves = [torch.randn(2, heads, length, dim) for heads, dim in ((6, 16), (2, 16), (2, 5))]
    leaves[1] = leaves[1] * scale
    leaves = [x.requires_grad_() for x in (*leaves, torch.rand(2, 2, 16, 6), torch.randn(2, length, 24))]
    key = with_gates(recurrence, leaves[1], leaves[4])
    mask = torch.rand(2, length) > 0.2
    weight = torch.randn(2, 6, length, 5)
    options: dict[str, Any] = {"query_map": maps[0], "key_map": maps[1], "recurrence": recurrence, "padding_mask": mask}
    found = {}
    for backend in ("reference", "chunked", "recurrent"):
        output, new = linear_attention(
            leaves[0], key, leaves[2], state=LinearState(leaves[3]), backend=backend, **options
        )
        loss = (output * weight).sum() + new.sums.square().mean()
        found[backend] = [output, new.sums, *gradients(loss, leaves, recurrence)]
    for backend in ("chunked", "recurrent"):
        for index, (actual, expected) in enumerate(zip(found[backend], found["reference"], strict=True)):
            assert relative(actual, expected) <= (2e-6 if index > 1 else 1e-6), (backend, index)


@pytest.mark.parametrize("base", ["retnet", "gated_delta"])
def test_what_a_chunk_forgets_is_no_subnormal_number(base: str) -> None:
    """Those make a CPU's products ten to a hundred times slower, and are nothing to what is kept."""

    class Strong(RECURRENCES.get(base)):  # type: ignore[misc]
        def log_decay(self, key: torch.Tensor, read: torch.Tensor) -> torch.Tensor:
            return key.new_full((*key.shape[:3], 1), -1.5)

    recurrence, key = Strong(RecurrenceShape(6, 2, 16, 16, 24)), torch.rand(1, 2, 150, 16)
    q, k, v = torch.rand(1, 6, 150, 16), with_gates(recurrence, key, torch.randn(1, 150, 24)), torch.rand(1, 2, 150, 5)
    fast, slow = (linear_attention(q, k, v, recurrence=recurrence, backend=b) for b in ("chunked", "reference"))
    assert relative(fast.output, slow.output) <= 1e-6
    assert relative(fast.state.sums, slow.state.sums) <= 1e-6
    decay = Decay.of(recurrence(k).log_decay[:, :, :128])
    least = min(float(factor_of(x).min()) for x in decay)
    assert least > torch.finfo().tiny * 1e9
    assert float(decay.between.exp().min()) < torch.finfo().tiny  # as exponentials they would be


@every_recurrence
def test_bfloat16_stays_within_its_rounding(name: str) -> None:
    maps, recurrence = [FEATURE_MAPS.get("softmax")(16, heads) for heads in (6, 2)], shaken(name).bfloat16()
    leaves = [torch.randn(1, heads, 300, 16).bfloat16().requires_grad_() for heads in (6, 2, 2)]
    key = with_gates(recurrence, leaves[1], torch.randn(1, 300, 24).bfloat16())
    weight = torch.randn(1, 6, 300, 16)
    options: dict[str, Any] = {"query_map": maps[0], "key_map": maps[1], "recurrence": recurrence}
    found = {}
    for backend in ("reference", "chunked"):
        output, _ = linear_attention(leaves[0], key, leaves[2], backend=backend, **options)
        loss = (output.float() * weight).sum()
        found[backend] = [output, *torch.autograd.grad(loss, leaves, retain_graph=True)]
    for index, (actual, expected) in enumerate(zip(found["chunked"], found["reference"], strict=True)):
        assert relative(actual, expected) <= (1e-2 if index else 6e-3), index


@every_recurrence
def test_token_by_token_stays_with_the_chunks_for_8192_tokens(name: str) -> None:
    maps = [FEATURE_MAPS.get("softmax")(16, heads).bfloat16() for heads in (6, 2)]
    recurrence = RECURRENCES.get(name)(RecurrenceShape(6, 2, 16, 16, 24)).bfloat16()
    q, k, v = (torch.randn(1, heads, 8192, 16).bfloat16() for heads in (6, 2, 2))
    key = with_gates(recurrence, k, torch.randn(1, 8192, 24).bfloat16())
    options: dict[str, Any] = {"query_map": maps[0], "key_map": maps[1], "recurrence": recurrence}
    with torch.no_grad():
        chunked, recurrent = (linear_attention(q, key, v, backend=b, **options) for b in ("chunked", "recurrent"))
    assert relative(chunked.output[:, :, -512:], recurrent.output[:, :, -512:]) <= 5e-3
    assert relative(chunked.state.kv, recurrent.state.kv) <= 5e-3
