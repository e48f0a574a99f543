"""Measurements on the disk, so that planning goes on after a kill."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from ..plans import Loss
from .probes import Probe

FILE = "measurements.jsonl"


class Journal:
    """What was measured, by key; in memory, and in a folder if there is one.

    Args:
        folder: Where; None for in memory only.
        identity: What all measurements of a folder have in common.

    Raises:
        ValueError: if the folder has measurements of something else.
    """

    def __init__(self, folder: Path | None, identity: str) -> None:
        self.known: dict[str, Any] = {}
        self.path = None if folder is None else folder / FILE
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if not self.path.exists():
            self._append({"identity": identity})
            return
        whole, _, cut = self.path.read_text(encoding="utf-8", errors="replace").rpartition("\n")
        lines = [json.loads(line) for line in whole.split("\n") if line]
        if not lines or lines[0].get("identity") != identity:
            raise ValueError(f"{folder} holds measurements of another model, other documents or options; give another")
        if cut:  # a line that was being written when the process was killed
            self.path.write_text(whole + "\n", encoding="utf-8")
        self.known = {line["key"]: line["value"] for line in lines[1:]}

    def __contains__(self, key: str) -> bool:
        return key in self.known

    def loss(self, key: str) -> Loss:
        return Loss(*self.known[key])

    def add(self, key: str, value: Any) -> None:
        self.known[key] = value
        if self.path is not None:
            self._append({"key": key, "value": value})

    def _append(self, line: dict[str, Any]) -> None:
        assert self.path is not None
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def identity_of(model: PreTrainedModel, probes: Sequence[Probe]) -> str:
    """Return a digest of the model and the calibration texts."""
    digest = hashlib.sha256(f"{Loss._fields}".encode())
    digest.update(json.dumps(model.config.to_dict(), sort_keys=True, default=str).encode())
    for name, parameter in model.named_parameters():
        digest.update(f"{name} {parameter.dtype} {float(parameter.detach().double().sum())}".encode())
    for probe in probes:
        digest.update(probe.ids.to(torch.int64).numpy().tobytes())
    return digest.hexdigest()[:16]
