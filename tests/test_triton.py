"""The Triton kernels of linear attention, under the laws of the other backends: on a CUDA device as they are, elsewhere
by Triton's interpreter, which is numpy (`conftest` chooses it); and compiled for GPUs that are not there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from matrix import close, left_padded, positions_of, shake, through, tiny_model, tokens
from test_ops_linear import relative
from transformers import DynamicCache

from hf_effattn.feature_maps import FEATURE_MAPS
from hf_effattn.ops.linear import LinearOutput, LinearState, Plan, linear_attention, triton
from hf_effattn.recurrences import RECURRENCES, RecurrenceShape

kernels = pytest.importorskip("hf_effattn.ops.linear.kernels")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DECAYS = [None, *(name for name in RECURRENCES if not RECURRENCES.get(name).delta)]
SHARED_BYTES = 99 * 1024  # of a block, on every GPU since Ampere
every_decay = pytest.mark.parametrize("decay", DECAYS)


class Text:
    """Random features, values, gates, padding and a past, for one call.

    Args:
        decay: Name of the recurrence; None for a sum.
    """

    def __init__(
        self,
        decay: str | None,
        length: int,
        batch: int = 1,
        kv_heads: int = 2,
        groups: int = 3,
        features: int = 6,
        value_dim: int = 5,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        heads = kv_heads * groups
        self.recurrence = None
        query, key = torch.rand(batch, heads, length, features), torch.rand(batch, kv_heads, length, features)
        if decay is not None:
            shape = RecurrenceShape(heads, kv_heads, features, features, hidden_size=8)
            self.recurrence = RECURRENCES.get(decay)(shape).to(DEVICE)
            for parameter in self.recurrence.parameters():
                parameter.data += 0.5 * torch.randn_like(parameter)
            if self.recurrence.num_gates:
                gates = self.recurrence.read_hidden(torch.randn(batch, length, 8, device=DEVICE)).detach()
                key = torch.cat((key, gates.cpu()), dim=-1)
        made = (query, key, torch.randn(batch, kv_heads, length, value_dim))
        self.tensors = [x.to(DEVICE, dtype) for x in made]
        past = LinearState.of(torch.randn(batch, kv_heads, features, value_dim), torch.rand(batch, kv_heads, features))
        self.past = LinearState(past.sums.to(DEVICE))
        self.mask = torch.rand(batch, length, device=DEVICE) > 0.2

    def __call__(self, backend: str, **options: Any) -> LinearOutput:
        with torch.no_grad():
            return linear_attention(*self.tensors, recurrence=self.recurrence, backend=backend, **options)


def assert_like_reference(text: Text, tolerance: float | None = None, **options: Any) -> None:
    if tolerance is None:  # exponentials of a GPU are approximate
        tolerance = 1e-6 if DEVICE == "cpu" or text.recurrence is None else 5e-6
    actual, expected = (text(backend, **options) for backend in ("triton", "reference"))
    assert actual.output.dtype == expected.output.dtype
    assert relative(actual.output, expected.output) <= tolerance
    assert actual.state.sums.dtype == torch.float32
    assert relative(actual.state.kv, expected.state.kv) <= tolerance
    assert relative(actual.state.normalizer, expected.state.normalizer) <= tolerance


@every_decay
@pytest.mark.parametrize("length", [1, 15, 64, 70])
def test_fast_is_slow(decay: str | None, length: int) -> None:
    text = Text(decay, length, batch=2)
    assert_like_reference(text)
    assert_like_reference(text, state=text.past, padding_mask=text.mask)


@every_decay
@pytest.mark.parametrize(
    ("kv_heads", "groups", "features", "value_dim", "chunk", "length"),
    [
        (1, 1, 16, 16, 16, 33),
        (1, 4, 70, 65, 64, 70),
        (3, 1, 64, 130, 1, 20),
        (1, 7, 17, 1, 50, 40),
        (1, 1, 4, 8, 200, 600),
    ],
)
def test_tiles_may_be_partial_and_many(
    decay: str | None, kv_heads: int, groups: int, features: int, value_dim: int, chunk: int, length: int
) -> None:
    for tokens_ in (length, 1):
        text = Text(decay, tokens_, 1, kv_heads, groups, features, value_dim)
        assert_like_reference(text, state=text.past, chunk_size=chunk)


@every_decay
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("length", [1, 100])
def test_half_precision_stays_within_its_rounding(decay: str | None, dtype: torch.dtype, length: int) -> None:
    assert_like_reference(Text(decay, length, dtype=dtype), 6e-3)


@every_decay
@pytest.mark.parametrize("length", [1, 40])
def test_inputs_may_lie_in_memory_as_they_like(decay: str | None, length: int) -> None:
    text = Text(decay, length)
    expected = text("triton", state=text.past)
    sums = text.past.sums.transpose(2, 3).contiguous().transpose(2, 3)
    text.tensors = [x.transpose(1, 3).contiguous().transpose(1, 3) for x in text.tensors]
    actual = text("triton", state=LinearState(sums))
    assert relative(actual.output, expected.output) <= 1e-6
    assert relative(actual.state.sums, expected.state.sums) <= 1e-6


@every_decay
def test_gradients_are_those_of_the_reference(decay: str | None) -> None:
    """Of inputs, state, and the parameters of maps and recurrences, through outputs and state."""
    text = Text(decay, 90, batch=2, features=8)
    maps = [FEATURE_MAPS.get("hedgehog")(8, heads).to(DEVICE) for heads in (6, 2)]
    if text.recurrence is not None:  # its gates are made for the features of the map
        shape = RecurrenceShape(6, 2, 8, maps[1].feature_dim, hidden_size=8)
        if decay == "liger":  # which has a gate for each dimension of the head
            maps = [FEATURE_MAPS.get("softmax")(8, heads) for heads in (6, 2)]
            shape = shape._replace(feature_dim=8)
        text.recurrence = RECURRENCES.get(str(decay))(shape).to(DEVICE)
        gates = text.recurrence.num_gates
        text.tensors[1] = torch.cat((text.tensors[1][..., :8], torch.randn(2, 2, 90, gates, device=DEVICE)), dim=-1)
    sums = torch.rand(2, 2, maps[1].feature_dim, 6, device=DEVICE)
    leaves = [x.requires_grad_() for x in (*text.tensors, sums)]
    modules = [m for m in (*maps, text.recurrence) if m is not None]
    learned = [p for m in modules for p in m.parameters()]
    weight, found = torch.randn(2, 6, 90, 5, device=DEVICE), {}
    for backend in ("triton", "reference"):
        options = {"query_map": maps[0], "key_map": maps[1], "recurrence": text.recurrence, "padding_mask": text.mask}
        output, new = linear_attention(
            *leaves[:3], state=LinearState(leaves[3]), chunk_size=32, backend=backend, **options
        )
        loss = (output * weight).sum() + new.kv.pow(2).sum() + new.normalizer.sum()
        found[backend] = [output, *torch.autograd.grad(loss, [*leaves, *learned], materialize_grads=True)]
    for actual, expected in zip(found["triton"], found["reference"], strict=True):
        assert relative(actual, expected) <= (2e-6 if DEVICE == "cpu" else 1e-5)


@every_decay
@pytest.mark.parametrize("at", [8, 17, 39])
def test_nothing_from_the_future(decay: str | None, at: int) -> None:
    text = Text(decay, 40)
    before = text("triton", chunk_size=16).output
    for x in text.tensors:
        x[:, :, at] = 7.0
    assert torch.equal(text("triton", chunk_size=16).output[:, :, :at], before[:, :, :at])


@pytest.mark.parametrize("length", [1, 9])
def test_a_query_like_no_key_gets_zero(length: int) -> None:
    text = Text(None, length)
    text.tensors[0].zero_()
    output = text("triton").output
    assert torch.equal(output, torch.zeros_like(output))


@every_decay
def test_a_step_in_place_overwrites_the_state_and_no_other_does(decay: str | None) -> None:
    text = Text(decay, 1)
    plan, kept = Plan(chunk=1, recurrence=text.recurrence), text.past.sums.clone()
    with torch.no_grad():
        apart = triton.linear_attention(*text.tensors, text.past, plan)
        assert torch.equal(text.past.sums, kept)
        same = triton.linear_attention(*text.tensors, text.past, plan, in_place=True)
    assert same.state.sums.data_ptr() == text.past.sums.data_ptr()
    assert torch.equal(same.state.sums, apart.state.sums)
    assert torch.equal(same.output, apart.output)


@pytest.mark.parametrize("recurrence", ["sum", "retnet", "liger", "gla"])
@torch.no_grad()
def test_a_model_gives_one_answer(recurrence: str) -> None:
    """With left padding: prompt, one token and a few together are the full forward pass in chunks."""
    feature_map = "hedgehog" if recurrence == "sum" else "softmax"
    options = {"feature_map": feature_map, "recurrence": recurrence, "window": 0, "chunk_size": 16}
    nets = []
    for backend in ("chunked", "triton"):
        torch.manual_seed(0)  # some parameters start at random
        nets.append(shake(tiny_model("llama-gqa").convert_attention("linear", backend=backend, **options)).to(DEVICE))
    chunked, net = nets
    assert {layer.backend for layer in net.attention_report(64).layers} == {"triton"}
    rows = [tokens(size, seed=size).to(DEVICE) for size in (7, 30, 19)]
    ids, mask = (x.to(DEVICE) for x in left_padded([row.cpu() for row in rows]))
    positions, cache = positions_of(mask), DynamicCache(config=net.config)
    parts = [
        net(ids[:, a:b], attention_mask=mask[:, :b], position_ids=positions[:, a:b], **through(cache)).logits
        for a, b in ((0, 14), (14, 15), (15, 30))
    ]
    for index, row in enumerate(rows):
        expected = chunked(row[None], use_cache=False).logits[0]
        close(torch.cat(parts, dim=1)[index, -len(row) :], expected, 1e-5 if DEVICE == "cpu" else 1e-4)


def test_the_delta_rule_and_double_are_refused() -> None:
    text = Text(None, 3)
    text.recurrence = RECURRENCES.get("delta")(RecurrenceShape(6, 2, 6, 6, hidden_size=8)).to(DEVICE)
    text.tensors[1] = torch.rand(1, 2, 3, 6 + text.recurrence.num_gates, device=DEVICE)
    with pytest.raises(ValueError, match="not the delta rule of Delta; valid: auto, chunked, recurrent, reference"):
        text("triton")
    with pytest.raises(ValueError, match=r"computes float32, bfloat16, float16; got torch\.float64; valid: auto"):
        Text(None, 3, dtype=torch.float64)("triton")


def test_a_cpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "INTERPRETED", False)
    with pytest.raises(ValueError, match="needs a CUDA device; got tensors on cpu; valid: auto, chunked, recurrent"):
        linear_attention(*(x.cpu() for x in Text(None, 3).tensors), backend="triton")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "decay"), [("bf16", "none"), ("bf16", "head"), ("bf16", "feature"), ("fp32", "head"), ("fp16", "none")]
)
def test_kernels_compile_for_gpus_and_their_tiles_fit(dtype: str, decay: str) -> None:
    script = Path(__file__).with_name("kernel_compiler.py")
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, str(script), dtype, decay, "80", "90"]
    process = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    shared = json.loads(process.stdout.splitlines()[-1])
    assert len(shared) == 6
    assert max(shared.values()) <= SHARED_BYTES, shared


@pytest.mark.gpu
@every_decay
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_long_text_on_a_gpu_is_that_of_the_chunks(decay: str | None, dtype: torch.dtype) -> None:
    """In several segments, in the sizes of real heads, and trained."""
    torch.backends.cuda.matmul.allow_tf32 = False
    text = Text(decay, 20_000, 2, 2, 4, 128, 128, dtype)
    tolerance = 6e-3 if dtype == torch.bfloat16 else 5e-6
    actual, expected = (text(backend, state=text.past) for backend in ("triton", "chunked"))
    assert relative(actual.output, expected.output) <= tolerance
    assert relative(actual.state.sums, expected.state.sums) <= tolerance
    leaves, grads = [x.requires_grad_() for x in text.tensors], []
    for backend in ("triton", "chunked"):
        output = linear_attention(*leaves, recurrence=text.recurrence, backend=backend).output
        grads.append(torch.autograd.grad(output.float().pow(2).sum(), leaves))
    for one, other in zip(*grads, strict=True):
        assert relative(one, other) <= 2 * tolerance


@pytest.mark.gpu
@torch.no_grad()
def test_a_model_generates_in_half_precision_on_a_gpu() -> None:
    net = tiny_model("llama-gqa").convert_attention("linear", window=0, backend="triton").to("cuda", torch.bfloat16)
    ids = tokens(2, 40).cuda()
    assert net(ids).logits.isfinite().all()
    assert net.generate(ids, max_new_tokens=8, do_sample=False).shape == (2, 48)
