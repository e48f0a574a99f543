"""Law 5: caches of bounded patterns stop growing, and the report states their bytes. Law 10: fp32 states."""

from __future__ import annotations

import pytest
import torch
from matrix import DEFAULTS, MODELS, ONE_CASE_EACH, Case, converted_model, shake, tiny_model, tokens
from torch.utils import _pytree as pytree
from transformers import DynamicCache

from hf_effattn.attention.linear import HybridState
from hf_effattn.cache import EffAttnCacheLayer
from hf_effattn.ops.linear import LinearState

on_every_model = pytest.mark.parametrize("model", MODELS)
BOUNDED = [
    case for case in ONE_CASE_EACH if case.mechanism == "linear" or case.options["pattern"].retention.window is not None
]


def measured(cache: DynamicCache) -> int:
    return sum(layer.nbytes() for layer in cache.layers)  # type: ignore[attr-defined]


@pytest.mark.parametrize("case", ONE_CASE_EACH, ids=str)
@on_every_model
def test_the_report_states_the_bytes(model: str, case: Case) -> None:
    net = converted_model(model, case)
    for prefill, steps in ((1, 3), (7, 0), (40, 3), (100, 2)):
        cache = DynamicCache(config=net.config)
        net(tokens(1, prefill), past_key_values=cache)
        for _ in range(steps):
            net(tokens(1, 1), past_key_values=cache)
        report = net.attention_report(context_length=prefill + steps)
        assert measured(cache) == report.cache_bytes == sum(layer.cache_bytes for layer in report.layers)


@pytest.mark.parametrize("case", BOUNDED, ids=str)
@on_every_model
def test_bounded_caches_stop_growing(model: str, case: Case) -> None:
    net = converted_model(model, case)
    cache = DynamicCache(config=net.config)
    net(tokens(1, 40), past_key_values=cache)
    before = measured(cache)
    net(tokens(1, 60), past_key_values=cache)
    for _ in range(20):
        net(tokens(1, 1), past_key_values=cache)
    assert measured(cache) == before
    assert net.attention_report(context_length=10**6).cache_bytes == before


@on_every_model
def test_softmax_layers_are_reported_as_they_are(model: str) -> None:
    net = tiny_model(model)
    cache = DynamicCache(config=net.config)
    net(tokens(1, 50), past_key_values=cache)
    held = sum(x.nbytes for layer in cache.layers for x in (layer.keys, layer.values))
    report = net.attention_report(context_length=50)
    assert report.cache_bytes == held
    assert [layer.mechanism for layer in report.layers] == ["softmax"] * len(report.layers)
    assert "softmax" in str(report)


@pytest.mark.parametrize("case", DEFAULTS, ids=str)
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
        prefill = net(tokens(2, 30), past_key_values=cache).logits
        step = net(tokens(2, 1), past_key_values=cache).logits
    assert prefill.isfinite().all()
    assert step.isfinite().all()
    for state in states(cache):
        assert state.kv.dtype == state.normalizer.dtype == torch.float32


@pytest.mark.parametrize("case", DEFAULTS, ids=str)
@on_every_model
def test_half_precision_gives_one_answer_within_its_rounding(model: str, case: Case) -> None:
    net = shake(tiny_model(model).convert_attention(case.mechanism, **case.options))
    ids = tokens(2, 40)
    exact = net(ids, use_cache=False).logits
    half = net.to(torch.bfloat16)
    full = half(ids, use_cache=False).logits.float()
    cache = DynamicCache(config=half.config)
    parts = [
        half(ids[:, a:b], past_key_values=cache).logits for a, b in ((0, 13), *((t, t + 1) for t in range(13, 40)))
    ]
    error = (full - exact).norm() / exact.norm()
    assert error <= 0.05
    assert (torch.cat(parts, dim=1).float() - exact).norm() / exact.norm() <= 1.5 * error + 1e-3


def test_a_pickled_cache_keeps_its_precision(tmp_path: object) -> None:
    import pickle

    net = converted_model("llama-gqa", DEFAULTS[0])
    cache = DynamicCache(config=net.config)
    net(tokens(1, 30), past_key_values=cache)
    again = pickle.loads(pickle.dumps(cache))
    ids = tokens(1, 4, seed=5)
    assert torch.equal(net(ids, past_key_values=again).logits, net(ids, past_key_values=cache).logits)
