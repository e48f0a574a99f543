"""Heads that see differently: a store for each group of them, and the answer of one store that keeps every key."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from matrix import OF_FOUR_HEADS as CASES
from matrix import converted_model, tiny_model, tokens
from torch.utils import _pytree as pytree
from transformers import AutoModelForCausalLM

from hf_effattn import SparseConfig
from hf_effattn.attention import ByHeadAttention, Call, HeadGeometry, Mechanism, make_mechanism
from hf_effattn.cache import EffAttnCacheLayer
from hf_effattn.ops.sparse import sparse_attention
from hf_effattn.patterns import Pattern, Retention, bigbird, pattern_from_spec, shifted, sinks, sliding_window

GEOMETRY = HeadGeometry(num_heads=6, num_kv_heads=3, head_dim=8, value_dim=4)
WINDOWS: dict[str, list[int | None]] = {
    "neighbours": [64, 64, 64, 64, 512, 512],
    "scattered": [64, 64, 512, 512, 64, 64],
    "each its own": [40, 40, 64, 64, 300, 300],
    "one keeps all": [64, 64, None, None, 64, 64],
    "two keep all": [None, None, 64, 64, None, None],
    "differ among the queries of a head": [64, 20, 20, 64, 512, None],
}
every_choice = pytest.mark.parametrize("windows", WINDOWS.values(), ids=WINDOWS)


def made(windows: list[int | None], **options: Any) -> Mechanism:
    return make_mechanism(SparseConfig(window=windows, **options), GEOMETRY)


def inputs(length: int, batch: int = 1) -> tuple[torch.Tensor, ...]:
    shapes = ((6, 8), (3, 8), (3, 4))
    return tuple(torch.randn(batch, length, *shape).transpose(1, 2) for shape in shapes)


def stored(net: Mechanism, *calls: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
    """What a cache holds after the calls."""
    layer = EffAttnCacheLayer()
    for q, k, v in calls:
        layer.bind(net.describe())
        layer.update(k, v)
        layer.claim(q.shape[2])
        net(q, k, v, scale=8**-0.5, cache_layer=layer)
    return [x for x in pytree.tree_leaves(layer.state) if isinstance(x, torch.Tensor)]


def measured(tensors: list[torch.Tensor]) -> int:
    storages = [x.untyped_storage() for x in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


@every_choice
@torch.inference_mode()
def test_memory_is_the_sum_over_heads(windows: list[int | None]) -> None:
    net = made(windows)
    held = stored(net, inputs(3000), inputs(1))
    assert measured(held) == net.cache_bytes(3001, torch.float32)
    kept = 0
    for head in range(3):
        pair = windows[2 * head : 2 * head + 2]
        kept += 3072 if None in pair else 4 + max(each for each in pair if each is not None)  # room comes in 256 tokens
    assert measured([x for x in held if x.ndim == 4]) == kept * (8 + 4) * 4
    longest = make_mechanism(SparseConfig(window=[None if None in windows else 512] * 6), GEOMETRY)
    assert measured(held) < 0.8 * longest.cache_bytes(3001, torch.float32)


@every_choice
@pytest.mark.parametrize("cuts", [(700, 701), (1, 500, 700, 701, 702), (64, 128, 129, 600)], ids=str)
def test_the_answer_is_that_of_all_keys_under_masks(windows: list[int | None], cuts: tuple[int, ...]) -> None:
    q, k, v = inputs(cuts[-1], batch=2)
    net, state, outputs = made(windows), None, []
    for low, high in zip((0, *cuts), cuts, strict=False):
        output, state = net.attend(state, *(x[:, :, low:high] for x in (q, k, v)), Call(8**-0.5))
        outputs.append(output)
    expected = sparse_attention(q, k, v, SparseConfig(window=windows).resolve(), backend="masked")
    torch.testing.assert_close(torch.cat(outputs, dim=2), expected, atol=1e-5, rtol=1e-5)


def test_heads_that_keep_the_same_share_a_store_and_windows_take_the_fast_path() -> None:
    stores = [len(made(windows).attend(None, *inputs(5), Call(1.0))[1]) for windows in WINDOWS.values()]
    assert stores == [2, 2, 3, 2, 2, 2]
    for name, windows in WINDOWS.items():
        assert made(windows).backend() == ("gathered" if "differ" in name else "banded")
    assert made([64] * 6).backend() == "banded"
    assert made([64] * 5 + [None]).backend() == "banded, gathered"
    assert made([64, 64, 64, 64, 9, 9], backend="banded").backend() == "banded"


def test_only_what_differs_by_head_is_taken_apart() -> None:
    assert type(make_mechanism(SparseConfig(window=64), GEOMETRY)) is not ByHeadAttention
    joined = sliding_window([8, 8, 8, 8, 64, 64]) & shifted(8)  # which keys shifted groups show depends on the head
    net = make_mechanism(SparseConfig(pattern=joined), GEOMETRY)
    assert net.cache_bytes(500, torch.float32) == net.cache_bytes(5000, torch.float32)
    assert len(net.attend(None, *inputs(5), Call(1.0))[1]) == 1


def test_patterns_tell_what_some_heads_see() -> None:
    pattern = sliding_window([4, None, 9, 9]) | sinks(2)
    assert pattern.for_heads is not None
    assert pattern.for_heads((2, 3)).band == (sliding_window(9) | sinks(2)).band
    assert pattern.for_heads((1,)).retention == Retention()
    for heads in ((0, 1), (3, 1, 0), (2,)):
        index = torch.arange(30)[None]
        part = pattern.for_heads(heads).visible(index, index, len(heads)).expand(1, len(heads), 30, 30)
        assert torch.equal(part, pattern.visible(index, index, 4)[:, list(heads)])
        again = pattern_from_spec(pattern.for_heads(heads).spec)
        assert again == pattern.for_heads(heads)
    assert (pattern | bigbird(4)).for_heads is None
    assert Pattern(lambda b, h, q, k: k <= q).for_heads is None


def test_a_list_with_none_is_saved_as_null(tmp_path: Path) -> None:
    net = tiny_model("llama-gqa").convert_attention("sparse", window=[None, None, 6, 6], num_sinks=2)
    ids, report = tokens(2, 30), net.attention_report()
    assert report.layers[0].mechanism == "sparse streaming(window=[None, None, 6, 6], num_sinks=2)"
    assert report.layers[0].visible_keys == 4096
    net.save_pretrained(tmp_path)
    spec = json.loads((tmp_path / "config.json").read_text())["effattn"]["layers"][0]
    assert spec["pattern"] == {"name": "streaming", "window": [None, None, 6, 6], "num_sinks": 2}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert str(loaded.attention_report()) == str(report)
    assert torch.equal(loaded(ids).logits, net(ids).logits)


def test_windows_may_be_given_for_key_value_heads() -> None:
    ids = tokens(2, 30)
    short, long = (
        tiny_model("llama-gqa").convert_attention("sparse", window=x) for x in ([9, None], [9, 9, None, None])
    )
    assert torch.equal(short(ids).logits, long(ids).logits)
    assert short.attention_report().cache_bytes == long.attention_report().cache_bytes
    assert short.attention_report().layers[0].mechanism == "sparse streaming(window=[9, None], num_sinks=4)"


def test_windows_of_none_alone_change_nothing() -> None:
    net, ids = tiny_model("llama-gqa"), tokens(2, 40)
    expected = net(ids).logits
    net.convert_attention("sparse", window=[None] * 4)
    torch.testing.assert_close(net(ids).logits, expected, atol=1e-5, rtol=1e-5)
    assert net.attention_report(context_length=512).layers[0].backend == "banded"


def test_dropped_weights_are_made_up_for() -> None:
    net, (q, k, v) = made([None, None, 300, 300, 300, 300]), inputs(600, batch=4)
    output = net(q, k, torch.ones_like(v), scale=0.1, dropout=0.3)
    assert output.std() > 0.01
    assert abs(float(output.detach()[:, :, 100:].mean()) - 1) < 0.01


def test_gradients_are_those_of_the_masked_backend() -> None:
    leaves = [x.requires_grad_() for x in inputs(400)]
    weight = torch.randn(1, 6, 400, 4)
    for windows in WINDOWS.values():
        found = [
            torch.autograd.grad((made(windows, backend=each)(*leaves, scale=0.3) * weight).sum(), leaves)
            for each in ("auto", "masked")
        ]
        for actual, expected in zip(*found, strict=True):
            torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


def test_the_report_counts_what_each_head_computes() -> None:
    net = converted_model("llama-gqa", CASES[-1])
    layer = net.attention_report(context_length=1000).layers[0]
    geometry = net.model.layers[0].self_attn.effattn.geometry
    width = geometry.head_dim + geometry.value_dim
    assert layer.flops_per_token == 2 * width * 2 * (1000 + 6 + 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": [4, 8, 8]}, "is for 3 heads; the layer has 4 query heads and 2 key/value heads"),
        ({"window": []}, "one for each head; got an empty list"),
        ({"window": [4, 4, 0, None]}, "each window that is not None must be at least 1; got 0"),
        ({"window": [4, 4, 2.5, None]}, "each window that is not None must be an integer of at least 1; got 2.5"),
        ({"window": None}, r"'streaming' needs \['window'\]"),
        ({"window": [4, 4, 8, 8], "position_mode": "rolling"}, "none that all heads share"),
        ({"window": [None] * 4, "position_mode": "rolling"}, "is for windows with sinks"),
        ({"window": [4, 8, 8, 8], "backend": "banded"}, "2 query heads of a key/value head.* has others"),
    ],
)
def test_what_does_not_fit_is_named(options: dict[str, Any], message: str) -> None:
    net = tiny_model("llama-gqa")
    with pytest.raises((TypeError, ValueError), match=message):
        net.convert_attention("sparse", **options)
    with pytest.raises(TypeError, match="window must be an integer"):
        sliding_window(None)  # type: ignore[arg-type]
