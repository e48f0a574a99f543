"""Fine-tune with LoRA on long documents: accelerate launch recipes/finetune.py --config FILE.yaml key=value

For converted models, also recovered ones (`adapter=recover_output/adapter`), and dense ones (`mechanism=null`). What is
learned goes to OUT/adapter. The same command goes on after a kill; `--help` lists the keys.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import models
import torch
from data import open_data
from peft import PeftModel
from settings import FinetuneConfig, read_config
from stages import convert, groups_of, lora
from torch import nn
from transformers import Trainer, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint

from hf_effattn.integration import is_learned
from hf_effattn.recovery import load_adapter, save_adapter

LEARNED = "effattn.pt"


def learned(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the trained parameters of mechanisms."""
    return {n: p.detach() for n, p in model.named_parameters() if is_learned(n) and p.requires_grad}


class AdapterTrainer(Trainer):
    """A Trainer that has a rate for what mechanisms learn, and saves it in checkpoints beside PEFT's adapter."""

    effattn_lr = 1e-3

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        groups = groups_of(self._module(model), self.args.learning_rate, self.effattn_lr)
        self.optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
        return self.optimizer

    def _module(self, model: Any = None) -> Any:
        return self.model if model is None else model

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            own, folder = learned(self._module()), Path(output_dir or str(self.args.output_dir))
            torch.save({name: (state_dict or own)[name] for name in own}, folder / LEARNED)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        saved = torch.load(Path(resume_from_checkpoint, LEARNED), map_location="cpu", weights_only=True)
        for name, tensor in learned(self._module(model)).items():
            tensor.copy_(saved[name])


def prepare(config: FinetuneConfig, load: Any) -> tuple[Any, Any]:
    """Return the model with what is trained of it, and the tokenizer."""
    model, tokenizer = load(config.model)
    if config.adapter is not None:
        model = load_adapter(model, config.adapter, trainable=True)
    else:
        convert(model, config)
    if isinstance(model, PeftModel):
        return model, tokenizer
    c = config
    return lora(model, c.lora_rank, c.lora_alpha, c.lora_mlp, lora_dropout=c.lora_dropout), tokenizer


def arguments(config: FinetuneConfig) -> TrainingArguments:
    new = "activation_checkpointing"  # its name since 5.20
    name = new if new in TrainingArguments.__dataclass_fields__ else "gradient_checkpointing"
    saving: dict[str, Any] = {name: config.gradient_checkpointing, f"{name}_kwargs": {"use_reentrant": False}}
    return TrainingArguments(
        output_dir=config.out,
        max_steps=config.steps,
        per_device_train_batch_size=config.batch_size,
        per_device_eval_batch_size=1,
        gradient_accumulation_steps=config.accumulation,
        learning_rate=config.lora_lr,
        lr_scheduler_type="cosine",
        warmup_steps=round(config.warmup * config.steps),
        max_grad_norm=config.max_norm,
        bf16=config.bf16,
        **saving,
        seed=config.seed,
        logging_steps=1,
        eval_strategy="steps" if config.held_out else "no",
        eval_steps=config.validate_every,
        prediction_loss_only=True,
        save_steps=config.save_every,
        save_total_limit=2,
        report_to=config.trackers,
        remove_unused_columns=False,
    )


def run(config: FinetuneConfig, load: Any = models.load, callbacks: Any = None) -> Path:
    """Fine-tune a model; return the folder of the adapter."""
    set_seed(config.seed)
    model, tokenizer = prepare(config, load)
    data = open_data(config.documents, config.streaming, tokenizer, config.seed)
    kept = data.held_out(config.length, config.held_out)
    trainer = AdapterTrainer(
        model,
        arguments(config),
        data_collator=lambda rows: dict.fromkeys(("input_ids", "labels"), torch.tensor([x["input_ids"] for x in rows])),
        train_dataset=data.dataset(config.length),
        eval_dataset=[{"input_ids": row} for row in kept.tolist()] or None,
        callbacks=callbacks,
    )
    trainer.effattn_lr = config.effattn_lr
    newest = get_last_checkpoint(config.out) if config.resume and Path(config.out).is_dir() else None
    trainer.train(resume_from_checkpoint=newest)
    folder = Path(config.out) / "adapter"
    writes = trainer.is_world_process_zero()
    if hasattr(model.get_base_model().config, "effattn"):
        save_adapter(model, folder, base=config.model, is_main_process=writes)
    else:
        state = trainer.accelerator.get_state_dict(trainer.model_wrapped)  # whole, where weights are shared out
        model.save_pretrained(str(folder), state_dict=state, is_main_process=writes)
    trainer.accelerator.end_training()  # a process that ends while its group is open may abort
    return folder


if __name__ == "__main__":
    run(read_config(FinetuneConfig, sys.argv[1:]))
