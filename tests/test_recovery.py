"""Recovery: a teacher that shares weights, transfer and distillation losses against plain ones, calibration, windows,
divergence."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from matrix import shake, tiny_model, tokens

from hf_effattn import LinearConfig
from hf_effattn.recovery import (
    Diverged,
    Guard,
    TopK,
    WindowDropout,
    calibrate,
    forward_kl,
    in_groups,
    losses,
    narrowed,
    reverse_kl,
    shared_teacher,
    transfer_losses,
)
from hf_effattn.recovery.calibration import BIASES

on_every_model = pytest.mark.parametrize("model", ["llama-gqa", "gpt2"])
WINDOW = {"window": 6, "num_sinks": 2}


def student(model: str = "llama-gqa", **options: Any) -> Any:
    return shake(tiny_model(model).convert_attention("linear", **{**WINDOW, **options}))


@on_every_model
def test_a_teacher_is_the_dense_model_without_memory_of_its_own(model: str) -> None:
    net, ids = student(model), tokens(2, 40)
    before = net(ids).logits
    teacher = shared_teacher(net)
    torch.testing.assert_close(teacher(ids).logits, tiny_model(model)(ids).logits, atol=0.0, rtol=0.0)
    assert torch.equal(net(ids).logits, before)
    own = {p.data_ptr() for p in net.parameters()}
    assert all(p.data_ptr() in own for p in teacher.parameters())
    assert {name for name, p in net.named_parameters() if p.requires_grad} == {
        name for name, _ in net.named_parameters() if ".effattn." in name
    }
    with pytest.raises(ValueError, match="its own teacher"):
        shared_teacher(teacher)
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(net, LoraConfig(target_modules="all-linear"))
    with pytest.raises(ValueError, match="carries an adapter"):
        shared_teacher(adapted.get_base_model())


@pytest.mark.parametrize("kind", ["output", "weights"])
@on_every_model
def test_transfer_is_zero_where_nothing_was_changed_and_reaches_maps_only(model: str, kind: str) -> None:
    ids = tokens(2, 40)
    same = student(model, window=64)
    for loss in transfer_losses(same, shared_teacher(same), ids, kind).values():
        assert float(loss.detach()) < 1e-5
    net = student(model)
    losses = transfer_losses(net, shared_teacher(net), ids, kind)
    assert list(losses) == list(range(net.config.num_hidden_layers))
    assert all(float(loss.detach()) > 1e-4 for loss in losses.values())
    sum(losses.values()).backward()
    for name, parameter in net.named_parameters():
        assert (parameter.grad is not None and bool(parameter.grad.any())) == (".effattn." in name), name
    with pytest.raises(ValueError, match="unknown kind of attention transfer 'both'; valid: output, weights"):
        transfer_losses(net, shared_teacher(net), ids, "both")


def test_transfer_is_the_error_of_the_first_layer_on_its_own_input() -> None:
    net, ids = student(), tokens(2, 40)
    teacher, found = shared_teacher(net), []
    for each in (net, teacher):
        each.model.layers[0].self_attn.register_forward_hook(lambda _, __, output: found.append(output[0]))
    losses = transfer_losses(net, teacher, ids)
    found.clear()
    with torch.no_grad():  # the first layer has the same input in both
        net(ids)
        teacher(ids)
    expected = (found[0] - found[1]).square().sum() / found[1].square().sum()
    torch.testing.assert_close(losses[0].detach(), expected, atol=1e-6, rtol=1e-5)


def test_transfer_training_brings_the_layers_closer() -> None:
    torch.manual_seed(0)
    net, ids = student(), tokens(4, 60)
    teacher = shared_teacher(net)
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=1e-2)
    history = []
    for _ in range(30):
        loss = sum(transfer_losses(net, teacher, ids).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(float(loss.detach()))
    assert history[-1] < 0.7 * history[0]


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_divergences_are_what_they_are_called(temperature: float) -> None:
    own, other = (torch.randn(2, 5, 11, dtype=torch.float64) for _ in range(2))
    p, q = ((x / temperature).softmax(dim=-1) for x in (other, own))
    forward = (p * (p / q).log()).sum(dim=-1).mean() * temperature**2
    reverse = (q * (q / p).log()).sum(dim=-1).mean() * temperature**2
    assert math.isclose(float(forward_kl(own, other, temperature)), float(forward), rel_tol=1e-5)
    assert math.isclose(float(reverse_kl(own, other, temperature)), float(reverse), rel_tol=1e-5)
    assert float(forward_kl(own, own, temperature)) < 1e-6
    kept = TopK.of(other, 4, temperature)
    index = other.topk(4, dim=-1).indices
    rest_p, rest_q = (1 - x.gather(-1, index).sum(dim=-1) for x in (p, q))
    best_p, best_q = p.gather(-1, index), q.gather(-1, index)
    expected = (best_p * (best_p / best_q).log()).sum(dim=-1) + rest_p * (rest_p / rest_q).log()
    found = float(forward_kl(own, kept, temperature))
    assert math.isclose(found, float(expected.mean()) * temperature**2, rel_tol=1e-4)
    assert found <= float(forward) * (1 + 1e-5)


@pytest.mark.parametrize("block", [1, 25, 1 << 21])
@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_gradients_of_divergences_are_those_of_their_formulas(
    direction: str, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(losses, "BLOCK", block)  # rows are compared some at a time
    own, other = (torch.randn(3, 5, 11, requires_grad=True) for _ in range(2))
    log_q, log_p = ((x.double() / 2.0).log_softmax(dim=-1) for x in (own, other.detach()))
    first, second = (log_p, log_q) if direction == "forward" else (log_q, log_p)
    expected = (first.exp() * (first - second)).sum(dim=-1).mean() * 4.0
    found = (forward_kl if direction == "forward" else reverse_kl)(own, other, 2.0)
    torch.testing.assert_close(found, expected.float())
    torch.testing.assert_close(*(torch.autograd.grad(3.0 * x, own)[0] for x in (found, expected)))


@on_every_model
def test_calibration_takes_the_best_bias_of_each_head(model: str) -> None:
    net, batches = student(model), [tokens(2, 50, seed=seed) for seed in (1, 2)]
    teacher = shared_teacher(net)

    def error() -> float:
        with torch.no_grad():
            return float(sum(sum(transfer_losses(net, teacher, ids).values()) for ids in batches))

    before = error()
    found = calibrate(net, teacher, batches)
    assert sorted(found) == list(range(net.config.num_hidden_layers))
    for name, parameter in net.named_parameters():
        if name.endswith("effattn.bias"):
            assert set(parameter.tolist()) <= set(BIASES)
    assert error() <= before * 1.05  # the best for each head by itself; the heads are summed behind


@pytest.mark.parametrize("window", [4, 0])
def test_narrow_windows_are_those_of_a_narrow_model_and_end(window: int) -> None:
    net, ids = student(window=12), tokens(2, 50)
    given, narrow = net(ids).logits, student(window=window, num_sinks=2 if window else 0)
    narrow.load_state_dict(net.state_dict(), strict=bool(window))  # without a window there is no bias
    with narrowed(net, window):
        torch.testing.assert_close(net(ids).logits, narrow(ids).logits, atol=1e-5, rtol=1e-5)
        with narrowed(net, 100):
            torch.testing.assert_close(net(ids).logits, narrow(ids).logits, atol=1e-5, rtol=1e-5)
    assert torch.equal(net(ids).logits, given)
    with pytest.raises(ValueError, match="window must be at least 0; got -1"), narrowed(net, -1):
        pass


def test_windows_are_dropped_as_often_as_asked() -> None:
    plan = WindowDropout(0.6, (1, 8), steps=1000)
    generator = torch.Generator().manual_seed(0)
    early = [plan.draw(10, generator) for _ in range(2000)]
    late = [plan.draw(800, generator) for _ in range(2000)]
    assert sum(window is not None for window in early) / 2000 < 0.03
    assert abs(sum(window is not None for window in late) / 2000 - 0.6) < 0.04
    assert abs(late.count(1) - late.count(8)) < 150
    with pytest.raises(ValueError, match="between 0 and 1; got 2"):
        WindowDropout(2.0)
    with pytest.raises(ValueError, match="windows must be given, and none of them negative"):
        WindowDropout(0.5, (-1,))


def test_divergence_names_step_parameter_and_checkpoint() -> None:
    net = student()
    guard = Guard(factor=4.0, patience=2)
    for step in range(20):
        guard.check(step, 1.0 + 0.1 * (step % 3), net)
    guard.check(20, 50.0, net)
    guard.check(21, 1.0, net)  # once is no divergence
    guard.check(22, 50.0, net)
    guard.check(23, 60.0, net)
    for step in range(3):  # those of another kind are not compared with these
        guard.check(step, 1000.0, net, kind="narrow")
    with pytest.raises(Diverged, match=r"step 24: .* 4 times its median of 1.1 .*now 70; .*checkpoint is step-10"):
        guard.check(24, 70.0, net, "step-10")
    with pytest.raises(Diverged, match="step 3: the loss is nan; all trained parameters are finite; there is no"):
        Guard().check(3, math.nan, net)
    with torch.no_grad():
        net.model.layers[1].self_attn.effattn.bias[0] = math.inf
    with pytest.raises(Diverged, match=r"first parameter that is not finite is model.layers.1.self_attn.effattn.bias"):
        Guard().check(4, math.inf, net)


def test_layers_are_converted_in_groups() -> None:
    net = tiny_model("llama-gqa")
    number = net.config.num_hidden_layers
    seen = []
    for layers in in_groups(net, LinearConfig(**WINDOW), number):
        converted = [x.index for x in net.attention_report().layers if x.mechanism != "softmax"]
        assert converted == layers
        seen.append(layers)
    assert seen[0] == [number - 1]
    assert seen[-1] == list(range(number))
    with pytest.raises(ValueError, match="number must be at least 1"):
        next(in_groups(net, "linear", 0))
