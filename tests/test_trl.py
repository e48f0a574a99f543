"""TRL trains converted models: packed texts, texts without padding, preferences and rewards against the right model."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from matrix import DEFAULTS, Case, shake
from peft import LoraConfig
from small import PROSE, small_model, small_tokenizer
from transformers import AutoModelForCausalLM
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing.* is deprecated:FutureWarning")  # TRL's own
defaults = pytest.mark.parametrize("case", DEFAULTS, ids=str)
TOKENIZER = small_tokenizer()
WORDS = PROSE.split()
COMMON: dict[str, Any] = {
    "bf16": False,
    "disable_tqdm": True,
    "learning_rate": 1e-3,
    "logging_steps": 1,
    "max_steps": 3,
    "per_device_train_batch_size": 4,
    "report_to": [],
    "save_strategy": "no",
    "use_cpu": True,
}


def texts(*lengths: int) -> list[str]:
    """Pieces of so many words, one after the other."""
    words = itertools.cycle(WORDS)
    return [" ".join(itertools.islice(words, length)) for length in lengths]


LENGTHS = (5, 31, 12, 20, 7, 26, 3, 40, 11, 11, 18, 9)
PROMPTS = texts(4, 7, 3, 9, 5, 6, 8, 4)
TEXTS = Dataset.from_dict({"text": texts(*LENGTHS)})
PREFERENCES = Dataset.from_dict({"prompt": PROMPTS, "chosen": texts(*[6] * 8), "rejected": texts(*[9] * 8)})


def converted(case: Case) -> Any:
    return shake(small_model(TOKENIZER).convert_attention(case.mechanism, **case.options))


def saved(case: Case, folder: Path) -> str:
    converted(case).save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    return str(folder)


def logged(trainer: Any, name: str) -> list[float]:
    trainer.train()
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def reward(completions: list[str], **_: Any) -> list[float]:
    return [float(len(completion)) for completion in completions]


@defaults
def test_texts_without_padding_train_as_padded_ones_do(case: Case, tmp_path: Path) -> None:
    trained, losses = [], []
    for options in ({}, {"padding_free": True, "max_length": None}):
        arguments = SFTConfig(str(tmp_path), **COMMON, **options)
        trainer = SFTTrainer(converted(case), arguments, train_dataset=TEXTS, processing_class=TOKENIZER)
        losses.append(logged(trainer, "loss"))
        trained.append(dict(trainer.model.named_parameters()))
    assert losses[0][-1] < losses[0][0]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)
    for name, parameter in trained[0].items():
        torch.testing.assert_close(trained[1][name], parameter, atol=1e-4, rtol=1e-4, msg=name)


@defaults
def test_packed_texts_do_not_see_each_other(case: Case, tmp_path: Path) -> None:
    arguments = SFTConfig(str(tmp_path), packing=True, max_length=96, **COMMON)
    trainer = SFTTrainer(converted(case), arguments, train_dataset=TEXTS, processing_class=TOKENIZER)
    batch = next(iter(trainer.get_train_dataloader()))
    assert len(batch["cu_seq_lens_q"]) > 5
    net = trainer.model.eval()
    ends = batch["cu_seq_lens_q"].tolist()
    with torch.no_grad():
        packed = net(**batch, use_cache=False).logits
        alone = [net(batch["input_ids"][:, a:b], use_cache=False).logits for a, b in itertools.pairwise(ends)]
    torch.testing.assert_close(packed, torch.cat(alone, dim=1), atol=1e-5, rtol=1e-5)
    losses = logged(trainer, "loss")
    assert losses[-1] < losses[0]
    trainer.save_model(str(tmp_path / "saved"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval()
    with torch.no_grad():
        again = loaded(**batch, use_cache=False).logits
        assert torch.equal(again, trainer.model.eval()(**batch, use_cache=False).logits)


@pytest.mark.parametrize("adapter", [False, True], ids=["all parameters", "lora"])
@defaults
def test_preferences_are_learned_against_the_converted_model(case: Case, adapter: bool, tmp_path: Path) -> None:
    """Of a folder, since TRL makes the reference from where the model came from; with LoRA, the model without it."""
    net = converted(case) if adapter else saved(case, tmp_path / "converted")
    lora = LoraConfig(target_modules=["q_proj", "v_proj"], modules_to_save=["effattn"])
    extra: dict[str, Any] = {"peft_config": lora, "processing_class": TOKENIZER} if adapter else {}
    trainer = DPOTrainer(net, args=DPOConfig(str(tmp_path), **COMMON), train_dataset=PREFERENCES, **extra)
    margins = logged(trainer, "rewards/margins")
    assert margins[0] == pytest.approx(0.0, abs=1e-5)
    assert margins[-1] > 1e-3


@defaults
def test_rewards_are_learned_from_generated_texts(case: Case, tmp_path: Path) -> None:
    options = {"num_generations": 4, "max_completion_length": 12, "beta": 0.1, **COMMON}
    trainer = GRPOTrainer(
        saved(case, tmp_path / "converted"),
        reward_funcs=reward,
        args=GRPOConfig(str(tmp_path), **options),
        train_dataset=Dataset.from_dict({"prompt": PROMPTS}),
    )
    divergences = logged(trainer, "kl")
    assert divergences[0] == pytest.approx(0.0, abs=1e-6)
    assert divergences[-1] > 1e-4
