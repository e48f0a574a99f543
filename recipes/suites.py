"""What the benchmark measures: for each suite the variants, as functions that are timed in turn."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import torch
from layers import DECODED, DRAFTED, FLEX, Bench
from models import load
from torch.nn.functional import scaled_dot_product_attention
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from hf_effattn import convert_attention
from hf_effattn.cache import EffAttnCacheLayer
from hf_effattn.ops.linear import linear_attention
from hf_effattn.ops.sparse import sparse_attention
from hf_effattn.patterns import streaming

Run = Callable[[], object]
MASKED_TO, FLEX_TO = 4096, 16384
QUADRATIC_TO = 2048  # tokens up to which the plain quadratic form is measured
OWN_WINDOWS = (256, 1024)  # of the cache that transformers has for them
DRAFT = 8  # tokens that are looked at and taken back
FEATURES = 128  # of the variant whose features are given
GIVEN = "linear, features given"
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {  # of the whole model
    "linear default": ("linear", {}),
    "linear hedgehog": ("linear", {"window": 0}),
    "streaming 256+4": ("sparse", {"window": 256, "num_sinks": 4}),
    "softmax through the plugin": ("sparse", {"pattern": "sliding_window", "window": 1_000_000}),
}


def sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def quadratic(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Linear attention with elu features by its definition, with a matrix of all weights."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    q, k = (torch.nn.functional.elu(x) + 1 for x in (q, k))
    weights = (q @ k.transpose(2, 3)).tril()
    return (weights / weights.sum(-1, keepdim=True)) @ v


def yardstick(bench: Bench) -> dict[str, Run]:
    """One product of 1024 × 1024 matrices: what the machine gives."""
    a = torch.randn(1024, 1024, device=bench.device).to(bench.dtype)
    return {"gemm1k": lambda: a @ a}


def prefill(bench: Bench, length: int) -> dict[str, Run]:
    """One whole prompt through one layer, feature maps included."""
    q, k, v = bench.inputs(length)
    runs: dict[str, Run] = {**yardstick(bench), "dense SDPA": lambda: sdpa(q, k, v)}
    if length <= QUADRATIC_TO:
        runs["quadratic elu"] = lambda: quadratic(q, k, v)
    features = [torch.rand(*x.shape[:3], FEATURES, device=bench.device).to(bench.dtype) for x in (q, k)]
    runs[GIVEN] = lambda: linear_attention(features[0], features[1], v)
    if v.is_cuda:
        runs[f"{GIVEN}, triton"] = lambda: linear_attention(features[0], features[1], v, backend="triton")
    for name in bench.names:
        runs[name] = functools.partial(bench.mechanism(name), q, k, v, scale=bench.scale)
    return runs | flash_linear_attention(bench, features, v) | windows(bench, q, k, v)


def windows(bench: Bench, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> dict[str, Run]:
    """What PyTorch has for the window of 256 with 4 sinks: a mask of all pairs, and compiled FlexAttention."""
    length, device = q.shape[2], bench.device
    pattern = streaming(256, 4)
    runs: dict[str, Run] = {}
    if length <= MASKED_TO:
        index = torch.arange(length, device=device)[None]
        mask = pattern.visible(index, index)[0]
        masked = functools.partial(scaled_dot_product_attention, attn_mask=mask, enable_gqa=True)
        runs["SDPA under a mask, 256+4"] = lambda: masked(q, k, v)
    if length <= FLEX_TO and not q.is_cuda:  # there it is one of the layers
        runs["FlexAttention compiled, 256+4"] = lambda: sparse_attention(q, k, v, pattern, backend="flex")
    return runs


def flash_linear_attention(bench: Bench, features: list[torch.Tensor], v: torch.Tensor) -> dict[str, Run]:
    """The kernel of flash-linear-attention without its normaliser, which it computes apart; on CUDA, if installed."""
    if not v.is_cuda:
        return {}
    with suppress(ImportError):
        from fla.ops.simple_gla import chunk_simple_gla

        q, k, values = (x.transpose(1, 2).contiguous() for x in (*features, v))
        k, values = (x.repeat_interleave(bench.groups, dim=2) for x in (k, values))
        return {"flash-linear-attention, features given": lambda: chunk_simple_gla(q, k, values)}
    return {}


def decode(bench: Bench, length: int) -> dict[str, Run]:
    """One more token after `length` of them, state and cache update included."""
    q, k, v = bench.inputs(length)
    one = [x[:, :, -1:] for x in (q, k, v)]
    base = torch.zeros(1, 3, 64, 64, device=bench.device)
    runs: dict[str, Run] = {**yardstick(bench), "add_ dispatch": lambda: base.add_(1.0)}
    runs["dense DynamicCache"] = _dense_step(k, v, one)
    runs["dense, preallocated"] = _preallocated_step(k, v, one)
    runs |= {f"transformers' window of {window}": _window_step(window, k, v, one) for window in OWN_WINDOWS}
    names = [name for name in (*bench.names, *DECODED) if name not in FLEX]  # single queries are never its
    return runs | {name: _converted_step(bench, name, (q, k, v), one) for name in names}


def _dense_step(k: torch.Tensor, v: torch.Tensor, one: list[torch.Tensor]) -> Run:
    layer = DynamicLayer()
    layer.update(k, v)

    def step() -> None:
        keys, values = layer.update(one[1], one[2])
        scaled_dot_product_attention(one[0], keys, values, enable_gqa=True)
        layer.crop(-1)

    return step


def _window_step(window: int, k: torch.Tensor, v: torch.Tensor, one: list[torch.Tensor]) -> Run:
    """One token behind the cache that transformers gives layers with a window of their own, which it makes anew."""
    layer = DynamicSlidingWindowLayer(window)
    layer.update(k, v)

    def step() -> None:
        keys, values = layer.update(one[1], one[2])
        scaled_dot_product_attention(one[0], keys, values, enable_gqa=True)

    return step


def _preallocated_step(k: torch.Tensor, v: torch.Tensor, one: list[torch.Tensor]) -> Run:
    length = k.shape[2]
    keys, values = (torch.cat((x, x[:, :, :1]), dim=2).contiguous() for x in (k, v))

    def step() -> None:
        keys[:, :, length:], values[:, :, length:] = one[1], one[2]
        scaled_dot_product_attention(one[0], keys, values, enable_gqa=True)

    return step


def draft(bench: Bench, length: int) -> dict[str, Run]:
    """The last tokens of `length`, at once, and taken back: what assisted decoding asks of the model that decides."""
    tensors = bench.inputs(length)
    text, last = ([x[:, :, part] for x in tensors] for part in (slice(length - DRAFT), slice(length - DRAFT, None)))
    runs = {**yardstick(bench), "dense DynamicCache": _dense_draft(text, last)}
    names = [name for name in (*bench.names, *DECODED, *DRAFTED) if name not in FLEX]
    return runs | {name: _converted_draft(bench, name, text, last) for name in names}


def _dense_draft(text: list[torch.Tensor], last: list[torch.Tensor]) -> Run:
    layer = DynamicLayer()
    layer.update(*text[1:])
    past = text[1].shape[2]
    mask = torch.ones(DRAFT, past + DRAFT, dtype=torch.bool, device=text[1].device).tril(past)

    def step() -> None:
        keys, values = layer.update(last[1], last[2])
        scaled_dot_product_attention(last[0], keys, values, attn_mask=mask, enable_gqa=True)
        layer.crop(-DRAFT)

    return step


def _converted_draft(bench: Bench, name: str, text: list[torch.Tensor], last: list[torch.Tensor]) -> Run:
    call, layer = _call(bench, name, text)
    layer.record_past = True

    def step() -> None:
        call(*last)
        layer.crop(-DRAFT)

    return step


def _converted_step(bench: Bench, name: str, text: tuple[torch.Tensor, ...], one: list[torch.Tensor]) -> Run:
    call, _ = _call(bench, name, text)
    return lambda: call(*one)


def _call(bench: Bench, name: str, text: Sequence[torch.Tensor]) -> tuple[Callable[..., None], EffAttnCacheLayer]:
    """Return what computes a layer for more tokens behind a text, and the layer of its cache."""
    net, layer = bench.mechanism(name), EffAttnCacheLayer()

    def call(*tokens: torch.Tensor) -> None:
        layer.bind("benchmark")
        layer.update(tokens[1], tokens[2])
        layer.claim(tokens[1].shape[2])
        net(*tokens, scale=bench.scale, cache_layer=layer)

    if name in (*DECODED, *DRAFTED):
        layer.ingest(*text[1:])  # without the time of a prefill
    else:
        call(*text)
    return call, layer


def train(bench: Bench, length: int) -> dict[str, Run]:
    """Forward and backward of one layer over one text."""
    tensors = [x.requires_grad_() for x in bench.inputs(length)]
    gradient = torch.randn(tensors[0].shape, device=bench.device).to(bench.dtype)

    def step(function: Callable[..., torch.Tensor], extra: list[Any]) -> Run:
        def run() -> None:
            torch.autograd.grad(function(*tensors), [*tensors, *extra], gradient)

        return run

    runs: dict[str, Run] = {**yardstick(bench), "dense SDPA": step(sdpa, [])}
    if length <= QUADRATIC_TO:
        runs["quadratic elu"] = step(quadratic, [])
    for name in bench.names:
        layer = bench.mechanism(name)
        learned = [p for p in layer.parameters() if p.requires_grad]
        runs[name] = step(functools.partial(layer, scale=bench.scale), learned)
    return runs


@functools.cache
def _models(dtype: torch.dtype, device: str) -> dict[str, Any]:
    dense, _ = load(dtype=dtype)
    nets: dict[str, Any] = {"dense": dense}
    nets |= {name: convert_attention(copy.deepcopy(dense), m, **o) for name, (m, o) in VARIANTS.items()}
    return {name: net.to(device) for name, net in nets.items()}


def model(bench: Bench, length: int) -> dict[str, Run]:
    """One whole prompt through SmolLM2-135M, without a cache."""
    ids = torch.randint(0, 1000, (1, length), generator=torch.Generator().manual_seed(0)).to(bench.device)
    nets = _models(bench.dtype, bench.device)
    call: dict[str, Any] = {"use_cache": False, "logits_to_keep": 1}
    return yardstick(bench) | {name: functools.partial(net, ids, **call) for name, net in nets.items()}
