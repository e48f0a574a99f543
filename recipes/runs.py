"""Training runs: their log, and checkpoints that one can go on from after a kill."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from safetensors.torch import load_file, save_file
from torch import nn

FREE = ("out", "resume", "save_every", "validate_every", "trackers")  # what may change between a run and its resume
TRAINED = "trained.safetensors"


class Run:
    """The folder of a run, and the steps it has done.

    Args:
        accelerator: Of the run.
        config: A dataclass with `out`, `resume` and `trackers`. What a run has begun with, it goes on with.
        keep: Checkpoints that stay.

    Raises:
        ValueError: if there are checkpoints of another config, or a tracker is not installed.
    """

    def __init__(self, accelerator: Accelerator, config: Any, keep: int = 2) -> None:
        self.accelerator, self.config, self.folder, self.keep = accelerator, config, Path(config.out), keep
        settings = dataclasses.asdict(config)
        missing = set(config.trackers) - {str(tracker.value) for tracker in get_available_trackers()}
        if missing:
            raise ValueError(f"trackers that are not installed: {', '.join(sorted(missing))}")
        if config.resume and self.checkpoint:
            before = json.loads((self.folder / "config.json").read_text())
            other = [key for key in settings if key not in FREE and before.get(key) != settings[key]]
            if other:
                raise ValueError(
                    f"{self.folder} has checkpoints of a run with other values of {', '.join(other)}; give another "
                    "`out`, or resume=false to start over"
                )
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            self._begin(settings, config.resume)
        accelerator.wait_for_everyone()
        accelerator.register_save_state_pre_hook(self._save_trained)
        accelerator.register_load_state_pre_hook(self._load_trained)
        accelerator.init_trackers("hf_effattn", {key: str(value) for key, value in settings.items()})

    @property
    def checkpoints(self) -> list[Path]:
        """The complete checkpoints, by step."""
        return sorted(self.folder.glob("checkpoint-*"))

    @property
    def checkpoint(self) -> Path | None:
        """The newest complete checkpoint."""
        return self.checkpoints[-1] if self.checkpoints else None

    @property
    def step(self) -> int:
        """The step of the newest checkpoint, 0 without one."""
        return int(self.checkpoint.name.rpartition("-")[2]) if self.checkpoint else 0

    def log(self, **entry: Any) -> None:
        """Add a line to log.jsonl, and its numbers to the trackers."""
        if self.accelerator.is_main_process:
            with (self.folder / "log.jsonl").open("a") as file:
                file.write(json.dumps(entry) + "\n")
        numbers = {f"{entry['stage']}/{key}": value for key, value in entry.items() if isinstance(value, float)}
        self.accelerator.log(numbers, step=entry["step"])

    def save(self, step: int) -> Path:
        """Save everything that step `step` left, under a name that only complete checkpoints have; return where."""
        partial, path = self.folder / "partial", self.folder / f"checkpoint-{step:06d}"
        if self.accelerator.is_main_process:
            shutil.rmtree(partial, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self.accelerator.save_state(str(partial))
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            os.replace(partial, path)
            for old in self.checkpoints[: -self.keep]:
                shutil.rmtree(old)
        self.accelerator.wait_for_everyone()
        return path

    def load(self) -> None:
        """Go back to the newest checkpoint."""
        self.accelerator.load_state(str(self.checkpoint))

    def _begin(self, settings: dict[str, Any], resume: bool) -> None:
        """Make the folder, with the checkpoints and lines of the log that the run goes on from, or none."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for path in [] if resume else self.checkpoints:
            shutil.rmtree(path)
        log, kept = self.folder / "log.jsonl", []
        for line in log.read_text().splitlines() if log.exists() and self.checkpoint else []:
            try:
                kept += [line + "\n"] if json.loads(line)["step"] <= self.step else []
            except json.JSONDecodeError:  # the run was killed while it wrote
                continue
        log.write_text("".join(kept))
        (self.folder / "config.json").write_text(json.dumps(settings, indent=1) + "\n")

    def _save_trained(self, models: list[nn.Module], weights: list[Any], folder: str) -> None:
        """Save what is trained in place of all weights."""
        weights.clear()
        if self.accelerator.is_main_process:
            tensors = _trained(self.accelerator.unwrap_model(models[0]))
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, Path(folder, TRAINED))

    def _load_trained(self, models: list[nn.Module], folder: str) -> None:
        model = self.accelerator.unwrap_model(models[0])
        models.clear()
        saved, own = load_file(Path(folder, TRAINED)), _trained(model)
        if saved.keys() != own.keys():
            raise ValueError(f"{folder} is of another model: {', '.join(sorted(saved.keys() ^ own.keys())[:5])}")
        for name, tensor in own.items():
            tensor.copy_(saved[name])


def _trained(model: nn.Module) -> dict[str, Any]:
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
