"""Law 5: caches of bounded patterns stop growing, and the report states their bytes. Law 10: fp32 states."""

from __future__ import annotations

import copy

import pytest
import torch
from matrix import (
    CASES,
    DEFAULTS,
    MODELS,
    OF_FOUR_HEADS,
    ONE_CASE_EACH,
    Case,
    close,
    converted_model,
    patterns,
    shake,
    through,
    tiny_model,
    tokens,
)
from torch.utils import _pytree as pytree
from transformers import DynamicCache

from hf_effattn import LinearConfig, SparseConfig
from hf_effattn.attention import Call, HeadGeometry, make_mechanism
from hf_effattn.attention.hybrid import HybridState
from hf_effattn.cache import EffAttnCacheLayer
from hf_effattn.config import make_config
from hf_effattn.evictions import EVICTIONS
from hf_effattn.ops.linear import LinearState
from hf_effattn.selectors import SELECTORS

on_every_model = pytest.mark.parametrize("model", MODELS)
BOUNDED = [
    case
    for case in ONE_CASE_EACH
    if case.mechanism == "linear" or ("pattern" in case.options and case.options["pattern"].retention.is_bounded)
]


def measured(cache: DynamicCache) -> int:
    return sum(layer.nbytes() for layer in cache.layers)  # type: ignore[attr-defined]


@pytest.mark.parametrize("case", ONE_CASE_EACH, ids=str)
@on_every_model
def test_the_report_states_the_bytes(model: str, case: Case) -> None:
    net = converted_model(model, case)
    for prefill, steps in ((1, 3), (7, 0), (40, 3), (100, 2)):
        cache = DynamicCache(config=net.config)
        net(tokens(1, prefill), **through(cache))
        for _ in range(steps):
            net(tokens(1, 1), **through(cache))
        report = net.attention_report(context_length=prefill + steps)
        assert measured(cache) == report.cache_bytes == sum(layer.cache_bytes for layer in report.layers)


@pytest.mark.parametrize("case", BOUNDED, ids=str)
@on_every_model
def test_bounded_caches_stop_growing(model: str, case: Case) -> None:
    net = converted_model(model, case)
    cache = DynamicCache(config=net.config)
    net(tokens(1, 40), **through(cache))
    before = measured(cache)
    net(tokens(1, 60), **through(cache))
    for _ in range(20):
        net(tokens(1, 1), **through(cache))
    assert measured(cache) == before
    assert net.attention_report(context_length=10**6).cache_bytes == before


LONG = {
    f"pattern-{name}": {"pattern": pattern} for name, pattern in patterns().items() if pattern.num_heads in (None, 2)
}
LONG |= {f"selector-{name}": {"selector": name} for name in SELECTORS}
LONG |= {f"eviction-{name}": {"eviction": name, "capacity": 1000} for name in EVICTIONS}


@pytest.mark.slow
@pytest.mark.parametrize("name", LONG)
@torch.inference_mode()
def test_storage_after_a_long_prompt_is_what_the_report_says(name: str) -> None:
    length, net = 32_768, make_mechanism(SparseConfig(**LONG[name]), HeadGeometry(2, 1, 8, 8))
    layer = EffAttnCacheLayer()
    for number in (length, 1):
        q, k, v = (torch.randn(1, heads, number, 8) for heads in (2, 1, 1))
        layer.bind(net.describe())
        layer.update(k, v)
        layer.claim(number)
        net(q, k, v, scale=8**-0.5, cache_layer=layer)
    leaves = [x.untyped_storage() for x in pytree.tree_leaves(layer.state) if isinstance(x, torch.Tensor)]
    held = sum({storage.data_ptr(): storage.nbytes() for storage in leaves}.values())
    assert held == net.cache_bytes(length + 1, torch.float32)


@on_every_model
def test_softmax_layers_are_reported_as_they_are(model: str) -> None:
    net = tiny_model(model)
    cache = DynamicCache(config=net.config)
    net(tokens(1, 50), **through(cache))
    held = sum(x.nbytes for layer in cache.layers for x in (layer.keys, layer.values))
    report = net.attention_report(context_length=50)
    assert report.cache_bytes == held
    assert [layer.mechanism for layer in report.layers] == ["softmax"] * len(report.layers)
    assert "softmax" in str(report)


@pytest.mark.parametrize("case", OF_FOUR_HEADS, ids=str)
@on_every_model
def test_no_state_stays_on_modules(model: str, case: Case) -> None:
    net = converted_model(model, case)
    before = {name: dict(module.__dict__) for name, module in net.named_modules()}
    buffers = list(net.state_dict())
    net.generate(tokens(2, 20), max_new_tokens=3)
    assert list(net.state_dict()) == buffers
    for name, module in net.named_modules():
        if "effattn" in name:
            assert module.__dict__ == before[name]
            held = {key: value for key, value in module.__dict__.items() if key not in ("_parameters", "_modules")}
            assert not any(isinstance(leaf, torch.Tensor) for leaf in pytree.tree_leaves(held))


def states(cache: DynamicCache) -> list[LinearState]:
    found = []
    for layer in cache.layers:
        assert isinstance(layer, EffAttnCacheLayer)
        found.append(layer.state.linear if isinstance(layer.state, HybridState) else layer.state)
    return found


@pytest.mark.parametrize("how", ["bfloat16", "half", "to", "autocast"])
@pytest.mark.parametrize("case", DEFAULTS[:2], ids=str)
@on_every_model
def test_states_are_float32_whatever_the_model(model: str, case: Case, how: str) -> None:
    net = shake(tiny_model(model).convert_attention(case.mechanism, **case.options))
    if how == "autocast":
        context = torch.autocast("cpu", dtype=torch.bfloat16)
    else:
        context = torch.autocast("cpu", enabled=False)
        net = net.to(torch.bfloat16) if how == "to" else getattr(net, how)()
    cache = DynamicCache(config=net.config)
    with context, torch.no_grad():
        prefill = net(tokens(2, 30), **through(cache)).logits
        step = net(tokens(2, 1), **through(cache)).logits
    assert prefill.isfinite().all()
    assert step.isfinite().all()
    for state in states(cache):
        assert state.kv.dtype == state.normalizer.dtype == torch.float32


@pytest.mark.parametrize("length", [1, 7, 8, 30])
def test_keys_of_a_full_window_are_stored_by_dimension(length: int) -> None:
    """Where one row decodes; whatever comes after sees the same keys."""
    net, ids = converted_model("llama-gqa", DEFAULTS[2]), tokens(1, 60)
    exact, cache, before = net(ids, use_cache=False).logits, DynamicCache(config=net.config), 0
    cuts = [length, *range(length + 1, 41), 47, *range(48, 52), 60]
    with torch.no_grad():
        for end in cuts:
            logits = net(ids[:, before:end], **through(cache)).logits
            close(logits, exact[:, before:end])
            if before >= 8 and end == before + 1:
                assert all(layer.state.keys.stride(2) == 1 for layer in cache.layers)
                assert cache.layers[0].nbytes() == net.attention_report(end).layers[0].cache_bytes
            before = end
        twin = copy.deepcopy(cache)
        twin.batch_repeat_interleave(2)
        more = tokens(1, 3, seed=1)
        single = torch.cat([net(more[:, t : t + 1], **through(cache)).logits for t in range(3)], dim=1)
        double = torch.cat([net(more[:, t : t + 1].repeat(2, 1), **through(twin)).logits for t in range(3)], dim=1)
        close(double, single.repeat(2, 1, 1))


@pytest.mark.parametrize("case", OF_FOUR_HEADS, ids=str)
@on_every_model
def test_half_precision_gives_one_answer_within_its_rounding(model: str, case: Case) -> None:
    net = shake(tiny_model(model).convert_attention(case.mechanism, **case.options))
    ids = tokens(2, 40)
    exact = net(ids, use_cache=False).logits
    half = net.to(torch.bfloat16)
    full = half(ids, use_cache=False).logits.float()
    cache = DynamicCache(config=half.config)
    parts = [half(ids[:, a:b], **through(cache)).logits for a, b in ((0, 13), *((t, t + 1) for t in range(13, 40)))]
    error = (full - exact).norm() / exact.norm()
    assert error <= 0.05
    assert (torch.cat(parts, dim=1).float() - exact).norm() / exact.norm() <= 1.5 * error + 1e-3


@pytest.mark.parametrize("case", OF_FOUR_HEADS, ids=str)
@on_every_model
def test_a_cache_goes_on_under_another_precision_or_mode(model: str, case: Case) -> None:
    net, ids = converted_model(model, case), tokens(1, 30)
    exact = net(ids, use_cache=False).logits
    cache = DynamicCache(config=net.config)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        net(ids[:, :20], **through(cache))
    parts = [net(ids[:, a:b], **through(cache)).logits for a, b in ((20, 21), (21, 30))]
    assert (torch.cat(parts, dim=1) - exact[:, 20:]).norm() / exact.norm() <= 0.05
    prefix = DynamicCache(config=net.config)
    with torch.inference_mode():
        net(ids[:, :29], **through(prefix))
    expected = net.generate(ids, max_new_tokens=5, do_sample=False)
    assert torch.equal(net.generate(ids, **through(prefix), max_new_tokens=5, do_sample=False), expected)


def test_large_scores_decode_in_float16() -> None:
    """Products of queries and keys that leave float16's range before they are scaled."""
    mechanism = make_mechanism(LinearConfig(window=4, num_sinks=0), HeadGeometry(1, 1, 64, 64)).half()
    query, key = ((torch.randn(1, 1, 8, 64) * 5 + 35).half() for _ in range(2))
    value, layer = torch.randn(1, 1, 8, 64).half(), EffAttnCacheLayer()
    whole = mechanism(query, key, value, scale=0.125)
    steps = [
        mechanism(*(x[:, :, t : t + 1] for x in (query, key, value)), scale=0.125, cache_layer=layer) for t in range(8)
    ]
    torch.testing.assert_close(torch.cat(steps, dim=2), whole, atol=5e-3, rtol=5e-3)


@pytest.mark.parametrize("case", [case for case in CASES if case.options["backend"] == "auto"], ids=str)
def test_everything_stays_on_its_device(case: Case) -> None:
    """On the meta device, where a tensor made elsewhere is an error: prefill of many lengths, then decoding."""
    mechanism = make_mechanism(make_config(case.mechanism, case.options), HeadGeometry(4, 2, 16, 16, 24)).to("meta")
    for lengths in ((1100, 10, 1, 1), (128, 10), (1, 1, 300, 1)):
        state = None
        for length in lengths:
            query, value = (torch.empty(1, heads, length, 16, device="meta") for heads in (4, 2))
            key = torch.empty(1, 2, length, 16 + mechanism.num_gates, device="meta")
            output, state = mechanism.attend(state, query, key, value, Call(0.25))
            assert output.shape == query.shape
            assert output.is_meta


def test_a_pickled_cache_keeps_its_precision(tmp_path: object) -> None:
    import pickle

    net = converted_model("llama-gqa", DEFAULTS[0])
    cache = DynamicCache(config=net.config)
    net(tokens(1, 30), **through(cache))
    again = pickle.loads(pickle.dumps(cache))
    ids = tokens(1, 4, seed=5)
    assert torch.equal(net(ids, **through(again)).logits, net(ids, **through(cache)).logits)
