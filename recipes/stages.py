"""What is trained in a model, and stages of training: steps with one optimizer and one loss."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from accelerate import Accelerator
from peft import LoraConfig, PeftModel, get_peft_model
from runs import Run
from torch import nn
from transformers import get_cosine_schedule_with_warmup
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D

from hf_effattn import Plan
from hf_effattn.integration import is_learned
from hf_effattn.recovery import Guard, narrowed
from hf_effattn.recovery.teacher import converted_layers
from hf_effattn.targets import find_targets


@dataclass
class Stage:
    """Some steps of a run, with an optimizer of their own.

    Args:
        name: In the log.
        begin, end: Steps of the run, counted from 1, before the first one and at the last one.
        module: What is trained.
        groups: Of the optimizer.
        losses: Of the module as accelerate wraps it and a batch; parts `[P]`, whose sum is the loss.
        lengths: Of the texts, one after the other.
        window: Of a step of the stage; None for the full one.
        wrapped: Whether accelerate wraps the module, for DDP or FSDP2. If not, each process has all of it, and losses
            may call its parts.
    """

    name: str
    begin: int
    end: int
    module: nn.Module
    groups: list[dict[str, Any]]
    losses: Callable[[Any, torch.Tensor], torch.Tensor]
    lengths: list[int]
    window: Callable[[int], int | None] = lambda step: None
    wrapped: bool = True

    def batches(self, data: Any, rows: int, done: int) -> Iterator[torch.Tensor]:
        """Yield the batches after step `done` of the run."""
        size = self.end - self.begin
        for number, length in enumerate(self.lengths):
            first, last = (self.begin + size * n // len(self.lengths) for n in (number, number + 1))
            if done < last:
                first = max(first, done)
                yield from islice(data.batches(length, rows, first), last - first)


def train(run: Run, stage: Stage, data: Any) -> Iterator[tuple[int, float]]:
    """Do the steps of a stage that are left; yield each with its loss before it may be saved.

    A batch is for all processes together, of which each takes its share, so their number changes nothing.
    """
    config, accelerator = run.config, run.accelerator
    module, optimizer, scheduler = prepared(stage, config, accelerator)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if run.step > stage.begin:
        run.load(module, optimizer, scheduler)
    guard = Guard()
    for step, batch in enumerate(stage.batches(data, config.batch_size, run.step), max(run.step, stage.begin) + 1):
        started, window = time.perf_counter(), stage.window(step - stage.begin - 1)
        share = batch[accelerator.process_index :: accelerator.num_processes].to(accelerator.device)
        parts = torch.zeros((), device=accelerator.device)
        with narrowed(stage.module, window) if window is not None else nullcontext():
            micro = share.split(config.micro_batch_size)
            for index, rows in enumerate(micro):
                last = index == len(micro) - 1
                with nullcontext() if last or not stage.wrapped else accelerator.no_sync(module):
                    found = stage.losses(module, rows) * (len(rows) / len(share))
                    accelerator.backward(found.sum())
                parts = parts + found.detach().float()
        if not stage.wrapped:
            average_gradients(parameters, accelerator)
        norm = float(accelerator.clip_grad_norm_(parameters, config.max_norm))
        losses: list[float] = accelerator.reduce(parts, "mean").tolist()
        # Gradients that are no numbers stop the run as a loss would, before they reach the parameters.
        guard.check(step, sum(losses) + 0.0 * norm, accelerator.unwrap_model(module), run.checkpoint, kind=window)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        rate, seconds = scheduler.get_last_lr()[0], round(time.perf_counter() - started, 3)
        entry = {"stage": stage.name, "step": step, "loss": sum(losses), "parts": losses, "grad_norm": norm}
        run.log(**entry, lr=rate, window=window, tokens=batch.numel(), seconds=seconds)
        yield step, sum(losses)
        if step % config.save_every == 0 or step == stage.end:
            run.save(step, module, optimizer, scheduler)
    accelerator.free_memory(module, optimizer, scheduler)


def prepared(stage: Stage, config: Any, accelerator: Accelerator) -> tuple[Any, Any, Any]:
    """Return the module of a stage, its optimizer and its schedule, as accelerate wraps them."""
    optimizer = torch.optim.AdamW(stage.groups, weight_decay=0.0)
    steps = stage.end - stage.begin
    scheduler = get_cosine_schedule_with_warmup(optimizer, round(config.warmup * steps), steps)
    if not stage.wrapped:
        return stage.module, optimizer, scheduler
    found: tuple[Any, Any, Any] = accelerator.prepare(stage.module, optimizer, scheduler)
    return found


def average_gradients(parameters: list[nn.Parameter], accelerator: Accelerator) -> None:
    """Let all processes have the mean of their gradients, as DDP does."""
    for parameter in parameters:
        if parameter.grad is not None:
            parameter.grad = accelerator.reduce(parameter.grad, "mean")


def convert(model: Any, config: Any) -> None:
    """Convert a model by the plan that a config names, or by its mechanism and options; without either not at all."""
    if config.plan is not None and config.options:
        raise ValueError(f"a plan says all; leave out options, which are {config.options}")
    if config.plan is not None:
        model.convert_attention(Plan.load(config.plan))
    elif config.mechanism is not None:
        model.convert_attention(config.mechanism, **config.options)


def checkpointed(model: Any) -> None:
    """Let the layers of `model` keep no activations, with all dropout still off, which `model.train()` would put on."""
    enable = getattr(
        model, "activation_checkpointing_enable", model.gradient_checkpointing_enable
    )  # its name since 5.20
    enable({"use_reentrant": False})
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.training = True


def frozen_in_bf16(model: nn.Module) -> None:
    """Round the weights of a converted model to bfloat16, but for what mechanisms learn: nothing else is trained, and
    autocast would round them again in each step."""
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(torch.float32 if is_learned(name) else torch.bfloat16)


def groups_of(model: nn.Module, lora_lr: float, effattn_lr: float) -> list[dict[str, Any]]:
    """Return what is trained of `model` as groups of an optimizer: what mechanisms learn has a rate of its own."""
    trained = [(is_learned(name), p) for name, p in model.named_parameters() if p.requires_grad]
    rates = ((False, lora_lr), (True, effattn_lr))
    groups = [{"params": [p for own, p in trained if own == side], "lr": rate} for side, rate in rates]
    return [group for group in groups if group["params"]]


def lora(model: Any, rank: int, alpha: int, mlp: bool = False, **options: Any) -> PeftModel:
    """Put LoRA on the projections of attention, or of whole layers, and train what conversion added along with it. Of a
    model of which layers are converted, the others stay what they are."""
    names = {id(module): name for name, module in model.named_modules()}
    targets, conv = [], False
    for attention in (converted_layers(model) or find_targets(model).modules).values():
        scope = names[id(attention)].rpartition(".")[0] if mlp else names[id(attention)]
        for name, module in model.get_submodule(scope).named_modules():
            if isinstance(module, (nn.Linear, Conv1D)) and "effattn" not in name.split("."):
                targets.append(f"{scope}.{name}")
                conv |= isinstance(module, Conv1D)
    settings = LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets, fan_in_fan_out=conv, **options)
    tuned = get_peft_model(model, settings)
    for name, parameter in tuned.named_parameters():
        if is_learned(name) and ".original_module." not in name:
            parameter.requires_grad_(True)
    return tuned
