"""Static caches: the same answers, in tensors that never move, so that a decoding step is compiled once."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import families
import pytest
import torch
from matrix import (
    DEFAULTS,
    MODELS,
    OF_FOUR_HEADS,
    Case,
    converted_model,
    left_padded,
    positions_of,
    shake,
    through,
    tiny_model,
    tokens,
)
from torch._dynamo.utils import counters
from transformers import AutoModelForCausalLM, CompileConfig, PreTrainedModel, StaticCache

# Beside the defaults, a store that keeps every key and one that pins some.
CASES = [
    *OF_FOUR_HEADS,
    Case("strided", "sparse", {"pattern": "strided", "stride": 4}),
    Case("global_tokens", "sparse", {"pattern": "global_tokens", "positions": (0, 9)}),
]
every_case = pytest.mark.parametrize("case", CASES, ids=str)
on_every_model = pytest.mark.parametrize("model", MODELS)
NEW: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False}


@functools.cache
def with_native_windows(case: Case) -> PreTrainedModel:
    """A model of which one layer keeps a window of its own, and native masks and cache layers with it."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(families.tiny_config("gemma3_text", sliding_window=8)).eval()
    return shake(model.convert_attention(case.mechanism, **case.options))


def compiled(net: PreTrainedModel) -> Callable[..., Any]:
    torch._dynamo.reset()
    counters.clear()
    return torch.compile(net.forward, fullgraph=True, backend="aot_eager")


def decode(
    net: PreTrainedModel,
    step: Callable[..., Any],
    ids: torch.Tensor,
    mask: torch.Tensor,
    steps: int,
    cache: Any,
    graphs: int = 1,
) -> torch.Tensor:
    """Greedy tokens through a compiled step, with the number of graphs after each step checked."""
    with torch.no_grad():
        logits = net(ids, attention_mask=mask, position_ids=positions_of(mask), **through(cache)).logits[:, -1:]
        out, position = [], mask.sum(dim=1, keepdim=True)
        for _ in range(steps):
            out.append(logits.argmax(dim=-1))
            logits = step(out[-1], **through(cache), position_ids=position).logits
            position = position + 1
            assert counters["stats"]["unique_graphs"] <= graphs
    return torch.cat((ids, *out), dim=1)


@every_case
@on_every_model
def test_a_static_cache_gives_the_same_tokens(model: str, case: Case) -> None:
    net = converted_model(model, case)
    ids, mask = left_padded([tokens(5), tokens(14, seed=1)])
    for options in ({}, {"num_beams": 3}, {"prefill_chunk_size": 4}, {"num_return_sequences": 2, "num_beams": 2}):
        expected = net.generate(ids, attention_mask=mask, **NEW, **options)
        static = net.generate(ids, attention_mask=mask, cache_implementation="static", **NEW, **options)
        assert torch.equal(static, expected), options


@pytest.mark.slow
@every_case
@pytest.mark.parametrize("model", ["llama-gqa", "gpt2"])
def test_a_compiled_step_gives_the_same_tokens_from_one_graph(model: str, case: Case) -> None:
    net = converted_model(model, case)
    ids, mask = left_padded([tokens(5), tokens(14, seed=1)])
    expected = net.generate(ids, attention_mask=mask, **NEW)
    step, cache = compiled(net), StaticCache(config=net.config, max_cache_len=40)
    assert torch.equal(decode(net, step, ids, mask, 12, cache), expected)
    cache.reset()
    assert cache.get_seq_length() == 0
    assert torch.equal(decode(net, step, ids, mask, 12, cache), expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "layers"),
    [*((case, None) for case in OF_FOUR_HEADS), (DEFAULTS[0], [0]), (DEFAULTS[0], [1]), (OF_FOUR_HEADS[-1], [0])],
    ids=str,
)
def test_softmax_layers_beside_converted_ones_compile_too(case: Case, layers: list[int] | None) -> None:
    net = with_native_windows(case)
    if layers:
        net = shake(tiny_model("llama-gqa").convert_attention(case.mechanism, layers=layers, **case.options))
    ids = tokens(2, 14)
    expected = net.generate(ids, **NEW)
    assert torch.equal(net.generate(ids, cache_implementation="static", **NEW), expected)
    cache = StaticCache(config=net.config, max_cache_len=40)
    # A native window counts its tokens in a number, which the second step learns to see as a variable.
    found = decode(net, compiled(net), ids, torch.ones_like(ids), 12, cache, graphs=1 if layers else 2)
    assert torch.equal(found, expected)


@pytest.mark.slow
@pytest.mark.parametrize("case", OF_FOUR_HEADS, ids=str)
def test_generate_compiles_by_itself(case: Case) -> None:
    net = converted_model("llama-gqa", case)
    config = CompileConfig(fullgraph=True, backend="aot_eager", dynamic=False)
    config._compile_all_devices = True  # transformers compiles on accelerators only, unless told so
    torch._dynamo.reset()
    counters.clear()
    for prompt in (tokens(2, 14), tokens(2, 9, seed=1)):
        static = net.generate(prompt, cache_implementation="static", compile_config=config, **NEW)
        assert torch.equal(static, net.generate(prompt, **NEW))
    assert counters["stats"]["unique_graphs"] in (1, 2)
    assert not counters["graph_break"]


@every_case
def test_the_tensors_of_a_static_cache_stay_where_they_are(case: Case) -> None:
    net, ids = converted_model("llama-gqa", case), tokens(2, 30)
    cache = StaticCache(config=net.config, max_cache_len=300)
    addresses = set()
    with torch.no_grad():
        for size in (9, 1, 1, 7, 1, 11):
            net(ids[:, :size], **through(cache))
            addresses.add(tuple(buffer.data_ptr() for layer in cache.layers for buffer in layer.buffers))
    assert len(addresses) == 1
    assert int(cache.get_seq_length()) == 30


@every_case
def test_a_static_cache_can_be_reordered(case: Case) -> None:
    net, ids, more = converted_model("llama-gqa", case), tokens(3, 20), tokens(3, 1, seed=1)
    cache = StaticCache(config=net.config, max_cache_len=40)
    order = torch.tensor([2, 0, 0])
    with torch.no_grad():
        net(ids, **through(cache))
        cache.reorder_cache(order)
        actual = net(more, **through(cache)).logits
        expected = net(torch.cat((ids[order], more), dim=1), use_cache=False).logits[:, -1:]
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
