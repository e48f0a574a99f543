"""Recovery: the model as its own teacher, transfer and distillation losses against plain ones, calibration, windows,
divergence."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from matrix import shake, tiny_model, tokens
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM

from hf_effattn import LinearConfig
from hf_effattn.attention import HeadGeometry, LinearAttention
from hf_effattn.integration.binding import bind_cache
from hf_effattn.recovery import (
    Diverged,
    Guard,
    KeptLogits,
    TopK,
    WindowDropout,
    as_teacher,
    calibrate,
    forward_kl,
    freeze_base,
    in_groups,
    losses,
    narrowed,
    reverse_kl,
    save_adapter,
    transfer_losses,
)
from hf_effattn.recovery.calibration import MULTIPLES, faster
from hf_effattn.recovery.decays import decay_rate, far_attention
from hf_effattn.recovery.settling import BIASES, measure, put, settle
from hf_effattn.recovery.teacher import converted_layers
from hf_effattn.recovery.transfer import mechanism_call, watched

on_every_model = pytest.mark.parametrize("model", ["llama-gqa", "gpt2"])
WINDOW = {"window": 6, "num_sinks": 2}


def student(model: str = "llama-gqa", **options: Any) -> Any:
    return shake(tiny_model(model).convert_attention("linear", **{**WINDOW, **options}))


def held(net: Any) -> Any:
    """All that a teacher must leave as it was."""
    modules = {name: (type(m), m.training, getattr(m, "config", None)) for name, m in net.named_modules()}
    tensors = {name: (id(x), x.requires_grad, x._version) for name, x in net.named_parameters()}
    return modules, tensors, net.config.to_json_string()


def dense(model: str) -> Any:
    torch.manual_seed(1)
    return AutoModelForCausalLM.from_config(families.tiny_config(model)).eval()


@pytest.mark.parametrize("options", [{}, {"layers": [0]}, {"recurrence": "gla"}], ids=str)
@pytest.mark.parametrize("model", ["llama", "gpt2", "gptj"])
def test_a_teacher_is_the_dense_model_and_then_the_student_is_back(model: str, options: dict[str, Any]) -> None:
    net, other = shake(dense(model).convert_attention("linear", **WINDOW, **options)), dense(model)
    ids = tokens(2, 40)
    mask = torch.ones_like(ids).index_fill(1, torch.arange(3), 0)
    state, given = held(net), net(ids, attention_mask=mask).logits
    with as_teacher(net):
        for keywords in ({}, {"attention_mask": mask}, {"use_cache": False}):
            torch.testing.assert_close(net(ids, **keywords).logits, other(ids, **keywords).logits, atol=0.0, rtol=0.0)
        assert torch.equal(*(m.generate(ids, max_new_tokens=4, do_sample=False) for m in (net, other)))
        with pytest.raises(ValueError, match="its own teacher"), as_teacher(net):
            pass
    assert held(net) == state
    assert torch.equal(net(ids, attention_mask=mask).logits, given)
    with pytest.raises(RuntimeError), as_teacher(net):
        raise RuntimeError
    assert held(net) == state


def test_a_teacher_has_no_adapter_and_no_dropout() -> None:
    net, ids = student("gpt2"), tokens(2, 40)
    config = LoraConfig(fan_in_fan_out=True, lora_dropout=0.5, modules_to_save=["effattn", "ln_f"])
    tuned = get_peft_model(net, config).train()
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.add_(0.1 if parameter.requires_grad else 0.0)
    state = held(tuned)
    with as_teacher(tuned):
        found = tuned(ids).logits
    assert torch.equal(found, tiny_model("gpt2")(ids).logits)
    assert not found.requires_grad
    assert held(tuned) == state
    assert not torch.allclose(tuned.eval()(ids).logits, found, atol=0.1)


def test_adapters_that_a_teacher_cannot_leave_out_are_refused() -> None:
    merged = get_peft_model(student(), LoraConfig(target_modules=["q_proj"]))
    merged.merge_adapter()
    with pytest.raises(ValueError, match=r"layers.0.self_attn.q_proj is merged into the teacher"), as_teacher(merged):
        pass
    prompt = get_peft_model(student(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    with pytest.raises(ValueError, match="of type PROMPT_TUNING adds tokens"), as_teacher(prompt):
        pass
    assert all(bind_cache in m._forward_pre_hooks.values() for m in converted_layers(prompt).values())


@pytest.mark.parametrize("kind", ["output", "weights"])
@on_every_model
def test_transfer_is_zero_where_nothing_was_changed_and_reaches_maps_only(model: str, kind: str) -> None:
    ids = tokens(2, 40)
    same = student(model, window=64)
    for loss in transfer_losses(same, ids, kind).values():
        assert float(loss.detach()) < 1e-5
    net = student(model)
    freeze_base(net)
    losses = transfer_losses(net, ids, kind)
    assert list(losses) == list(range(net.config.num_hidden_layers))
    assert all(float(loss.detach()) > 1e-4 for loss in losses.values())
    sum(losses.values()).backward()
    for name, parameter in net.named_parameters():
        assert (parameter.grad is not None and bool(parameter.grad.any())) == (".effattn." in name), name
    with pytest.raises(ValueError, match="unknown kind of attention transfer 'both'; valid: output, weights"):
        transfer_losses(net, ids, "both")


def test_transfer_is_the_error_of_the_first_layer_on_its_own_input() -> None:
    net, teacher, ids, found = student(), tiny_model("llama-gqa"), tokens(2, 40), []
    for each in (net, teacher):
        each.model.layers[0].self_attn.register_forward_hook(lambda _, __, output: found.append(output[0]))
    losses = transfer_losses(net, ids)
    found.clear()
    with torch.no_grad():  # the first layer has the same input in both
        net(ids)
        teacher(ids)
    expected = (found[0] - found[1]).square().sum() / found[1].square().sum()
    torch.testing.assert_close(losses[0].detach(), expected, atol=1e-6, rtol=1e-5)


def test_transfer_training_brings_the_layers_closer() -> None:
    torch.manual_seed(0)
    net, ids = student(), tokens(4, 60)
    freeze_base(net)
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=1e-2)
    history = []
    for _ in range(30):
        loss = sum(transfer_losses(net, ids).values())
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


def test_kept_logits_are_those_that_were_put(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ids, logits = tokens(3, 9), torch.randn(3, 9, 97)
    kept = KeptLogits(tmp_path, 5, 2.0, "some model")
    with monkeypatch.context() as patch:
        patch.delattr(os, "replace")  # a kill
        with pytest.raises(AttributeError):
            kept.put(ids, logits)
    assert kept.get(ids) is None
    assert list(tmp_path.iterdir()) == []
    expected = TopK.of(logits, 5, 2.0)
    assert all(map(torch.equal, kept.put(ids[:2], logits[:2]), TopK(*(x[:2] for x in expected))))
    assert kept.get(ids) is None  # the last text has not been read
    kept.put(ids[2:], logits[2:])
    found = kept.get(ids.flip(0))
    assert found is not None
    for given, wanted in zip(found, expected, strict=True):
        assert torch.equal(given, wanted.flip(0))
        assert given.dtype == wanted.dtype
    for other in ((4, 2.0, "some model"), (5, 1.0, "some model"), (5, 2.0, "another")):
        assert KeptLogits(tmp_path, *other).get(ids) is None
    with pytest.raises(ValueError, match="number must be at least 1; got 0"):
        KeptLogits(tmp_path, 0)


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


def head_errors(net: Any, batches: list[torch.Tensor]) -> dict[int, torch.Tensor]:
    """Squared error of each query head over that of an output of zeros, by layer."""
    found = {}
    for index, module in converted_layers(net).items():
        error, size = torch.zeros(2, 4)
        for ids in batches:
            (q, k, v), keywords = mechanism_call(module, watched(net, ids, [index])[index])
            k_all, v_all = (x.repeat_interleave(4 // k.shape[1], dim=1) for x in (k, v))
            hidden = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).triu(1)
            wanted = (q @ k_all.mT * keywords["scale"]).masked_fill(hidden, -torch.inf).softmax(dim=-1) @ v_all
            with torch.no_grad():
                error += (module.effattn(q, k, v, **keywords) - wanted).square().sum(dim=(0, 2, 3))
            size += wanted.square().sum(dim=(0, 2, 3))
        found[index] = error / size
    return found


CALIBRATED = [
    {},
    *({"recurrence": name, "window": window} for name in ("gla", "delta", "gated_delta") for window in (6, 0)),
    {"feature_map": "rebased"},
    {"feature_map": "elu", "recurrence": "retnet", "join": "lolcats"},
]


@pytest.mark.parametrize("shaken", [False, True], ids=["start", "shaken"])
@pytest.mark.parametrize("options", CALIBRATED, ids=str)
@on_every_model
def test_calibration_makes_no_head_worse_and_says_what_it_did(
    model: str, options: dict[str, Any], shaken: bool
) -> None:
    net = tiny_model(model).convert_attention("linear", **{"num_sinks": 2 * bool(options.get("window", 1)), **options})
    if shaken:
        shake(net)
    batches = [tokens(2, 50, seed=seed) for seed in (1, 2)]
    given, before = {name: x.clone() for name, x in net.named_parameters()}, head_errors(net, batches)
    found = calibrate(net, iter(batches))
    after = head_errors(net, batches)
    assert sorted(found) == list(range(net.config.num_hidden_layers))
    better = 0
    for index, layer in found.items():
        mechanism = converted_layers(net)[index].effattn
        torch.testing.assert_close(torch.tensor(layer.before), before[index], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(torch.tensor(layer.after), after[index], atol=1e-4, rtol=1e-4)
        assert (after[index] <= before[index] * (1 + 1e-5) + 1e-6).all()
        better += int((after[index] < 0.99 * before[index]).sum())
        bias = getattr(mechanism, "bias", None)
        assert layer.bias == (None if bias is None else bias.tolist())
        if bias is not None:
            assert set(layer.bias) <= {*BIASES, *given[f"{name_of(net, index)}.effattn.bias"].tolist()}
    assert better or "delta" not in options.get("recurrence", "")  # other errors of random models are small already
    for name, x in net.named_parameters():
        may_change = any(part in name for part in ("effattn.bias", "recurrence.gain", "recurrence.start"))
        assert may_change or torch.equal(x, given[name]), name


def name_of(net: Any, index: int) -> str:
    return next(name for name, module in net.named_modules() if module is converted_layers(net)[index])


def test_calibration_leaves_frozen_parameters_and_what_texts_do_not_tell() -> None:
    net, batches = student(recurrence="gated_delta"), [tokens(2, 50)]
    given = {name: x.clone() for name, x in net.named_parameters()}
    found = calibrate(net, [tokens(2, 5)])  # shorter than the window: softmax attention already
    assert all(torch.equal(x, given[name]) for name, x in net.named_parameters())
    for name, x in net.named_parameters():
        x.requires_grad_(name.endswith("recurrence.gain"))
    found = calibrate(net, batches)
    changed = {name.split("effattn.")[-1] for name, x in net.named_parameters() if not torch.equal(x, given[name])}
    assert changed == {"recurrence.gain"}
    assert all((c.bias, c.decay) == (None, None) and c.gain for c in found.values())
    for options in ({"feature_map": "elu"}, {"feature_map": "softmax", "recurrence": "liger"}):
        assert calibrate(tiny_model("llama-gqa").convert_attention("linear", window=0, **options), batches) == {}
    assert calibrate(tiny_model("llama-gqa").convert_attention("sparse", window=6, num_sinks=2), batches) == {}


PLANTED = torch.tensor([0.3, 0.02])  # rates of decay of two key/value heads


def distant(length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries and keys whose softmax weights are `exp(−rate · distance)`."""
    key = (PLANTED[:, None] * torch.arange(length))[None, :, :, None].expand(1, 2, length, 8) / 8
    return torch.ones(1, 4, length, 8), key


@pytest.mark.parametrize(("window", "num_sinks"), [(0, 0), (6, 0), (6, 2)])
def test_the_decay_of_softmax_attention_is_found(window: int, num_sinks: int) -> None:
    fars = [far_attention(*distant(length), 1.0, window, num_sinks) for length in (100, 300, 5)]
    torch.testing.assert_close(decay_rate(fars[0].joined(fars[1]).joined(fars[2])), PLANTED, rtol=2e-3, atol=0.0)
    far, masses = fars[1], fars[1].mass.sum(dim=1)
    simple = torch.log1p(masses / far.distance)  # −log d/(1+d), for texts without end
    assert (simple[0] / PLANTED[0]).item() == pytest.approx(1.0, abs=0.02)
    even = far_attention(torch.zeros(1, 4, 300, 8), torch.zeros(1, 2, 300, 8), 1.0, window, num_sinks)
    assert decay_rate(even).max() < 1.01 / (300 - window - num_sinks)  # no decay, as far as 300 tokens tell


@pytest.mark.parametrize("recurrence", ["gla", "gated_delta"])
def test_a_planted_decay_is_set(recurrence: str) -> None:
    torch.manual_seed(0)
    config = LinearConfig(recurrence=recurrence, window=0)
    mechanism = LinearAttention(config, HeadGeometry(4, 2, 8, 8, 12))
    (query, key), value, hidden = distant(300), torch.randn(1, 2, 300, 8), torch.randn(1, 300, 12)
    with torch.no_grad():
        keywords = {"scale": 1.0, "gates": mechanism.read_hidden(hidden)}
        for feature_map in (mechanism.query_map, mechanism.key_map):
            feature_map.weight.zero_()  # all keys are alike
        rate = decay_rate(far_attention(query, key, 1.0, 0, 0))
        options = faster(mechanism, rate)
        for option, multiple in zip(options[1:], MULTIPLES, strict=True):
            put(mechanism, option)
            expected = (-PLANTED * multiple).clamp(min=-5.0).exp()
            torch.testing.assert_close(mechanism.recurrence.start_decay(), expected, rtol=5e-3, atol=1e-6)
        mechanism.recurrence.reset_parameters()
        settled = settle(mechanism, options, measure(mechanism, options, (query, key, value), keywords))
    if recurrence == "gla":  # which is then softmax attention
        torch.testing.assert_close(mechanism.recurrence.start_decay(), (-PLANTED).exp(), rtol=1e-3, atol=0.0)
        assert settled.option.tolist() == [1, 1]
        assert (settled.after < 1e-4).all()
        assert (settled.before > 0.1).all()
    assert (settled.after <= settled.before).all()


def test_a_planted_gain_is_set() -> None:
    torch.manual_seed(0)
    mechanism = LinearAttention(LinearConfig(recurrence="delta", window=0), HeadGeometry(4, 2, 8, 8, 12))
    key = torch.randn(1, 2, 1, 8).expand(5, -1, -1, -1)
    query = key.repeat_interleave(2, dim=1) + torch.randn(1, 4, 1, 8)
    with torch.no_grad():
        # Of one token softmax attention gives the value, and the delta rule β φ(q)·φ(k) times that.
        gates = mechanism.read_hidden(torch.zeros(5, 1, 12))
        features = (mechanism.query_map(query[:1]), mechanism.key_map(key[:1]).repeat_interleave(2, dim=1))
        wanted = 2.0 / torch.nn.functional.cosine_similarity(*(x[0, :, 0] for x in features), dim=-1)
        keywords = {"scale": 1.0, "gates": gates}
        sums = measure(mechanism, [{}], (query, key, torch.randn(5, 2, 1, 8)), keywords)
        settled = settle(mechanism, [{}], sums)
    torch.testing.assert_close(mechanism.recurrence.gain.detach(), wanted)
    assert (settled.after < 1e-6).all()


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


def test_only_the_main_process_writes_an_adapter(tmp_path: Path) -> None:
    save_adapter(student(), tmp_path / "other", is_main_process=False)
    assert not (tmp_path / "other").exists()


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
