"""Recover a converted model: accelerate launch recipes/distill.py --config recipes/configs/smollm2-135m.yaml key=value

Attention transfer, then distillation of the dense model's logits into feature maps and LoRA. What is learned goes to
OUT/adapter, for `hf_effattn.recovery.load_adapter`. The same command goes on after a kill. `--help` lists the keys.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import models
import torch
from accelerate.utils import set_seed
from data import open_data
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from runs import TEACHER, Run, accelerator_of
from settings import DistillConfig, read_config
from stages import Stage, checkpointed, convert, frozen_in_bf16, groups_of, lora, train
from torch.nn.functional import cross_entropy

from hf_effattn import recovery


class Distillation:
    """A student, its teacher, and the stages in which one learns from the other.

    Args:
        config: How.
        load: Returns the dense model and its tokenizer.
    """

    def __init__(self, config: DistillConfig, load: Any) -> None:
        self.config = config
        self.accelerator = accelerator_of(config)
        self.run = Run(self.accelerator, config)
        set_seed(config.seed)
        self.student, tokenizer = load(config.model)
        self.data = open_data(config.documents, config.streaming, tokenizer, config.seed)
        self.kept = self.data.held_out(config.lengths[-1], config.held_out)
        convert(self.student.eval().to(self.accelerator.device), config)
        if config.bf16:
            frozen_in_bf16(self.student)
        recovery.freeze_base(self.student)
        self.kept_logits = None
        if config.cached_logits is not None:
            teacher, folder = f"{config.model} bf16={config.bf16}", self.run.folder / TEACHER
            self.kept_logits = recovery.KeptLogits(folder, config.cached_logits, config.temperature, teacher)

    def calibrate(self) -> None:
        c = self.config
        batches = [
            rows.to(self.accelerator.device) for rows in islice(self.data.batches(c.lengths[0], 1), c.calibration)
        ]
        recovery.calibrate(self.student, batches)

    def transfer(self) -> Stage:
        c = self.config
        groups = [{"params": [p for p in self.student.parameters() if p.requires_grad], "lr": c.transfer_lr}]
        narrow, first = lambda step: c.transfer_window, c.lengths[:1]
        losses = self.transfer_losses
        return Stage("transfer", 0, c.transfer_steps, self.student, groups, losses, first, narrow, wrapped=False)

    def transfer_losses(self, student: Any, ids: torch.Tensor) -> torch.Tensor:
        """Return the losses of attention transfer `[layers]`."""
        # Row by row, since errors are relative to the size of what is compared: no row counts more in larger batches.
        with self.accelerator.autocast():
            found = [recovery.transfer_losses(student, row) for row in ids.split(1)]
        return torch.stack([torch.stack(list(losses.values())) for losses in found]).mean(dim=0)

    def distill(self) -> Stage:
        c = self.config
        self.student = lora(self.student, c.lora_rank, c.lora_alpha, c.lora_mlp)
        if c.gradient_checkpointing:
            checkpointed(self.student.get_base_model())
        groups = groups_of(self.student, c.lora_lr, c.effattn_lr)
        dropout = recovery.WindowDropout(c.window_dropout, tuple(c.windows), c.distill_steps)

        def window(step: int) -> int | None:  # the same in all processes, and in a run that goes on
            return dropout.draw(step, torch.Generator().manual_seed(c.seed * 1_000_003 + step))

        end = c.transfer_steps + c.distill_steps
        return Stage("distill", c.transfer_steps, end, self.student, groups, self.losses, c.lengths, window)

    def losses(self, student: Any, ids: torch.Tensor) -> torch.Tensor:
        """Return forward KL, and weighted reverse KL, as a tensor `[2]`."""
        c = self.config
        wanted = self.wanted(student, ids)  # first, while the student keeps no activations
        logits = student(input_ids=ids, use_cache=False).logits
        forward = recovery.forward_kl(logits, wanted, c.temperature)
        if not c.reverse_weight:
            return torch.stack((forward, forward.new_zeros(())))
        return torch.stack((forward, c.reverse_weight * recovery.reverse_kl(logits, wanted, c.temperature)))

    def wanted(self, student: Any, ids: torch.Tensor) -> Any:
        """Return the logits of the teacher, or the largest of them where these are kept."""
        kept = self.kept_logits
        if kept is not None:
            found = kept.get(ids)
            # All processes ask the teacher, or none does: each may have only a part of its weights.
            if self.accelerator.reduce(torch.tensor(float(found is not None), device=ids.device), "mean") == 1.0:
                return found
        with recovery.as_teacher(self.student):
            logits = student(input_ids=ids, use_cache=False).logits
        return logits if kept is None else kept.put(ids, logits)

    @torch.no_grad()
    def validate(self, step: int) -> None:
        """Log KL and the losses of student and teacher on windows that are held out."""
        found = []
        for ids in self.kept.to(self.accelerator.device).split(1):
            with self.accelerator.autocast():
                own = self.student(input_ids=ids, use_cache=False).logits
                with recovery.as_teacher(self.student):
                    wanted = self.student(input_ids=ids, use_cache=False).logits
            losses = [cross_entropy(x[0, :-1].float(), ids[0, 1:]) for x in (own, wanted)]
            found.append(torch.stack((recovery.forward_kl(own, wanted), *losses)))
        if found:
            kl, loss, teacher = torch.stack(found).mean(dim=0).tolist()
            self.run.log(stage="validation", step=step, kl=kl, loss=loss, teacher_loss=teacher)

    def save(self) -> None:
        writes, kind = self.accelerator.is_main_process, self.config.adapter_dtype
        dtype = None if kind is None else getattr(torch, kind)
        recovery.save_adapter(self.student, self.run.folder / "adapter", self.config.model, writes, dtype)

    def stages(self) -> Iterator[Stage]:
        """Yield the stages that are not done, each made when those before it are."""
        c = self.config
        learns = any(p.requires_grad for p in self.student.parameters())
        if learns and c.transfer_steps and self.run.step <= c.transfer_steps:
            yield self.transfer()
            if c.transfer_window is not None:  # beside the whole window the linear part has learned nothing yet
                self.calibrate()
        if c.distill_steps:
            yield self.distill()


def run(config: DistillConfig, load: Any = models.load, after_step: Callable[[int], Any] = lambda step: None) -> Path:
    """Recover a model; return the folder of the adapter."""
    job = Distillation(config, load)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, disable=not job.accelerator.is_main_process) as progress:
        task = progress.add_task(
            "calibration", total=config.transfer_steps + config.distill_steps, completed=job.run.step
        )
        if job.run.step == 0:
            job.calibrate()
            job.validate(0)
        for stage in job.stages():
            for step, loss in train(job.run, stage, job.data):
                progress.update(task, completed=step, description=f"{stage.name} {loss:.4f}")
                if step % config.validate_every == 0 or step == stage.end:
                    job.validate(step)
                if step % config.save_every == 0 or step == stage.end:
                    job.save()
                after_step(step)
    job.save()
    job.accelerator.end_training()
    return job.run.folder / "adapter"


if __name__ == "__main__":
    run(read_config(DistillConfig, sys.argv[1:]))
