"""Mechanisms by themselves, on queries and keys of any size."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from matrix import ONE_CASE_EACH, Case, shake, tiny_model, tokens

from hf_effattn.attention import HeadGeometry, Mechanism, make_mechanism
from hf_effattn.config import make_config
from hf_effattn.recurrences import RECURRENCES

GEOMETRY = HeadGeometry(num_heads=4, num_kv_heads=2, head_dim=16, value_dim=16, hidden_size=24)


def extras(mechanism: Mechanism, query: torch.Tensor, key: torch.Tensor) -> dict[str, Any]:
    """What the attention function hands to mechanisms that ask for it."""
    hidden = 30 * torch.randn(key.shape[0], key.shape[2], 24, dtype=key.dtype)
    return {
        "before_rotary": (query, key) if mechanism.before_rotary else None,
        "gates": mechanism.read_hidden(hidden) if mechanism.num_gates else None,
    }


def corrects(case: Case) -> bool:
    """Whether the case follows the delta rule, whose weights may be negative."""
    name = case.options.get("recurrence", "sum")
    return name != "sum" and RECURRENCES.get(name).delta


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", ONE_CASE_EACH, ids=str)
def test_activations_thirty_times_too_large_stay_finite(case: Case, dtype: torch.dtype) -> None:
    mechanism = make_mechanism(make_config(case.mechanism, case.options), GEOMETRY).to(dtype)
    tensors = [(30 * torch.randn(2, heads, 70, 16)).to(dtype).requires_grad_() for heads in (4, 2, 2)]
    output = mechanism(*tensors, scale=0.25, **extras(mechanism, *tensors[:2]))
    assert output.dtype == dtype
    assert output.isfinite().all()
    for gradient in torch.autograd.grad(output.float().square().mean(), [*tensors, *mechanism.parameters()]):
        assert gradient.isfinite().all()


@pytest.mark.parametrize("case", [case for case in ONE_CASE_EACH if not corrects(case)], ids=str)
def test_outputs_are_means_of_values(case: Case) -> None:
    """Weights are not negative and sum to one: if all values are equal, so are all outputs."""
    mechanism = make_mechanism(make_config(case.mechanism, case.options), GEOMETRY)
    query, key = torch.randn(2, 4, 70, 16), torch.randn(2, 2, 70, 16)
    value = torch.full((2, 2, 70, 16), 3.0)
    output = mechanism(query, key, value, scale=0.25, **extras(mechanism, query, key))
    zero = output.abs().amax(dim=-1, keepdim=True) < 1e-3  # relu features: a query that resembles no key gets nothing
    torch.testing.assert_close(output.masked_fill(zero, 3.0), torch.full_like(output, 3.0), atol=1e-4, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", ONE_CASE_EACH, ids=str)
def test_loud_projections_stay_finite_under_autocast(case: Case, dtype: torch.dtype) -> None:
    net = tiny_model("llama-gqa")
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if "q_proj" in name or "k_proj" in name or "v_proj" in name:
                parameter.mul_(30 / parameter.std() / parameter.shape[1] ** 0.5)  # of inputs of size one
    shake(net.convert_attention(case.mechanism, **case.options))
    with torch.autocast("cpu", dtype):
        logits = net(tokens(2, 70)).logits
    assert logits.isfinite().all()
    logits.float().square().mean().backward()
    for parameter in net.parameters():
        assert parameter.grad is None or parameter.grad.isfinite().all()
