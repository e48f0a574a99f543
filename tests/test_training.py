"""Converted models train like any other: gradients, checkpointing, LoRA, bf16, autocast, compile, Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from matrix import DEFAULTS, MODELS, OF_FOUR_HEADS, ONE_CASE_EACH, Case, through, tiny_model, tokens
from peft import LoraConfig, get_peft_model
from training import student
from transformers import DynamicCache, Trainer, TrainingArguments

on_every_model = pytest.mark.parametrize("model", MODELS)
defaults = pytest.mark.parametrize("case", OF_FOUR_HEADS, ids=str)
IDS = tokens(2, 24)


def gradients(net: torch.nn.Module, **options: Any) -> dict[str, torch.Tensor]:
    net.zero_grad()
    net(IDS, labels=IDS, **options).loss.backward()
    return {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("case", ONE_CASE_EACH, ids=str)
@on_every_model
def test_gradients_reach_every_parameter(model: str, case: Case) -> None:
    net = student(model, case)
    found = gradients(net, use_cache=False)
    assert found.keys() == dict(net.named_parameters()).keys()
    for name, gradient in found.items():
        assert gradient.isfinite().all(), name
        assert gradient.abs().sum() > 0, name
    with_cache = gradients(net)  # training with a cache is wasteful, not wrong
    for name, gradient in found.items():
        torch.testing.assert_close(with_cache[name], gradient, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("reentrant", [False, True])
@defaults
@on_every_model
def test_gradient_checkpointing_gives_the_same_gradients(model: str, case: Case, reentrant: bool) -> None:
    net = student(model, case)
    expected = gradients(net, use_cache=False)
    enable = getattr(net, "activation_checkpointing_enable", net.gradient_checkpointing_enable)  # its name since 5.20
    enable({"use_reentrant": reentrant})
    net.enable_input_require_grads()
    actual = gradients(net)
    assert actual.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], atol=1e-6, rtol=1e-5)


@defaults
@on_every_model
def test_converting_under_lora_is_converting_before(model: str, case: Case) -> None:
    net = get_peft_model(tiny_model(model), LoraConfig(r=4, task_type="CAUSAL_LM")).eval()
    net.base_model.model.convert_attention(case.mechanism, **case.options)
    expected = tiny_model(model).convert_attention(case.mechanism, **case.options)
    assert torch.equal(net(IDS).logits, expected(IDS).logits)


@on_every_model
def test_parameters_an_adapter_would_not_save_are_frozen(model: str, caplog: pytest.LogCaptureFixture) -> None:
    net = get_peft_model(tiny_model(model), LoraConfig(r=4, task_type="CAUSAL_LM"))
    net.convert_attention("linear")
    assert "modules_to_save" in caplog.text
    assert not any(p.requires_grad for name, p in net.named_parameters() if ".effattn." in name)


@defaults
@on_every_model
def test_a_prompt_trains_through_the_cache_of_a_frozen_model(model: str, case: Case) -> None:
    net = student(model, case).eval().requires_grad_(False)
    prompt = torch.nn.Parameter(torch.randn(1, 4, 64))
    cache = DynamicCache(config=net.config)
    net(inputs_embeds=prompt, **through(cache))
    logits = [net(IDS[:1, t : t + 1], **through(cache)).logits for t in range(12)]
    (actual,) = torch.autograd.grad(torch.cat(logits, dim=1).square().mean(), prompt)
    whole = torch.cat((prompt, net.get_input_embeddings()(IDS[:1, :12])), dim=1)
    (expected,) = torch.autograd.grad(net(inputs_embeds=whole, use_cache=False).logits[:, 4:].square().mean(), prompt)
    torch.testing.assert_close(actual, expected, atol=1e-6, rtol=1e-4)


@defaults
@on_every_model
def test_autocast_trains_close_to_full_precision(model: str, case: Case) -> None:
    net = student(model, case)
    expected = gradients(net, use_cache=False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = gradients(net, use_cache=False)
    for name in expected:
        assert actual[name].dtype == torch.float32
        assert actual[name].isfinite().all()
    total = sum(float((actual[n] - expected[n]).pow(2).sum()) for n in expected)
    assert total**0.5 <= 0.1 * sum(float(expected[n].pow(2).sum()) for n in expected) ** 0.5


@defaults
@on_every_model
def test_bfloat16_models_train(model: str, case: Case) -> None:
    net = student(model, case).to(torch.bfloat16)
    assert all(gradient.isfinite().all() for gradient in gradients(net, use_cache=False).values())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    ("model", "case"),
    [*(("llama-gqa", case) for case in OF_FOUR_HEADS if case.name != "streaming"), ("gpt2", DEFAULTS[2])],
    ids=str,
)
def test_a_compiled_forward_gives_the_same_logits(model: str, case: Case) -> None:
    torch._dynamo.reset()
    net = student(model, case).eval()
    compiled = torch.compile(net, backend="aot_eager")
    mask = torch.ones_like(IDS)
    mask[0, :5] = 0
    with torch.no_grad():
        for options in ({"use_cache": False}, {}, {"attention_mask": mask, "use_cache": False}):
            torch.testing.assert_close(
                compiled(IDS, **options).logits[:, 5:], net(IDS, **options).logits[:, 5:], atol=1e-5, rtol=1e-5
            )


@defaults
@on_every_model
def test_trainer_trains_saves_and_resumes(model: str, case: Case, tmp_path: Path) -> None:
    data = [{"input_ids": row, "labels": row} for row in tokens(8, 16)]
    common: dict[str, Any] = {
        "output_dir": str(tmp_path),
        "per_device_train_batch_size": 2,
        "save_steps": 2,
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "learning_rate": 1e-3,
    }
    whole = Trainer(student(model, case), TrainingArguments(**common, max_steps=4), train_dataset=data)
    whole.train()
    resumed = Trainer(student(model, case), TrainingArguments(**common, max_steps=4), train_dataset=data)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for (name, a), (_, b) in zip(whole.model.named_parameters(), resumed.model.named_parameters(), strict=True):
        torch.testing.assert_close(a, b, msg=name)
