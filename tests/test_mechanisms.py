"""Mechanisms by themselves, on queries and keys of any size."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from matrix import ONE_CASE_EACH, Case, close, shake, tiny_model, tokens

from hf_effattn.attention import Call, HeadGeometry, Mechanism, make_mechanism
from hf_effattn.cache import KeyValueState
from hf_effattn.config import make_config
from hf_effattn.recurrences import RECURRENCES

GEOMETRY = HeadGeometry(num_heads=4, num_kv_heads=2, head_dim=16, value_dim=16, hidden_size=24)


def made(case: Case) -> Mechanism:
    return make_mechanism(make_config(case.mechanism, case.options), GEOMETRY)


def keeps_all(case: Case) -> bool:
    """Whether the cache of a mechanism holds every key, in the slot of its position."""
    store = getattr(made(case), "store", None)
    return store is not None and store.window is None and made(case).backend() == "gathered"


ALL_IN_SLOTS = [case for case in ONE_CASE_EACH if keeps_all(case)]


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


def inputs_of(tokens: int) -> list[torch.Tensor]:
    return [torch.randn(2, heads, tokens, 16) for heads in (4, 2, 2)]


def answer(net: Mechanism, state: Any, inputs: list[torch.Tensor], low: int, high: int, **call: Any) -> Any:
    return net.attend(state, *(x[:, :, low:high] for x in inputs), Call(0.25, **call))


@pytest.mark.parametrize("number", [1, 5])
@pytest.mark.parametrize("case", ALL_IN_SLOTS, ids=str)
@torch.no_grad()
def test_tokens_that_are_taken_back_leave_what_was_there(case: Case, number: int) -> None:
    """A cache that records lets the next tokens fill empty slots, then goes on with others from the same state."""
    net, inputs, other = made(case), inputs_of(400), inputs_of(number)
    _, state = answer(net, None, inputs, 0, 390)
    expected, after = answer(net, state, inputs, 390, 390 + number)
    expected = torch.cat((expected, answer(net, after, inputs, 390 + number, 400)[0]), dim=2)
    alone, _ = answer(net, state, other, 0, number)
    tried, _ = answer(net, state, other, 0, number, may_fill=True, keep_state=False)
    close(tried, alone)
    actual, after = answer(net, state, inputs, 390, 390 + number, may_fill=True)
    last, _ = answer(net, after, inputs, 390 + number, 400, in_place=True, may_fill=True)
    close(torch.cat((actual, last), dim=2), expected)


@pytest.mark.parametrize("case", ALL_IN_SLOTS, ids=str)
@torch.no_grad()
def test_tokens_go_behind_others_without_a_copy_of_these(case: Case) -> None:
    net, inputs = made(case), inputs_of(400)
    states = [answer(net, None, inputs, 0, 390)[1]]
    states.append(answer(net, states[0], inputs, 390, 396, in_place=True, may_fill=True)[1])
    before, after = (state if isinstance(state, KeyValueState) else state.store for state in states)
    assert (before.keys.data_ptr(), before.values.data_ptr()) == (after.keys.data_ptr(), after.values.data_ptr())
    assert int(after.positions.max()) == 395


@pytest.mark.parametrize("number", [1, 5])
@pytest.mark.parametrize("case", ALL_IN_SLOTS, ids=str)
def test_what_a_pass_back_needs_is_not_overwritten(case: Case, number: int) -> None:
    net, inputs = made(case), [x.requires_grad_() for x in inputs_of(400)]
    output, state = answer(net, None, inputs, 0, 390)
    with torch.no_grad():
        answer(net, state, inputs, 390, 390 + number, in_place=True, may_fill=True)
    output.sum().backward()


@pytest.mark.parametrize("number", [1, 5])
@pytest.mark.parametrize("case", ALL_IN_SLOTS, ids=str)
def test_a_prompt_in_inference_mode_may_be_followed_by_other_modes_and_dtypes(case: Case, number: int) -> None:
    net, inputs = made(case), inputs_of(400)
    with torch.inference_mode():
        _, state = answer(net, None, [x.bfloat16() for x in inputs], 0, 390)
    with torch.no_grad():
        output, _ = answer(net, state, inputs, 390, 390 + number, in_place=True, may_fill=True)
    assert output.isfinite().all()
