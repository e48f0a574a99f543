"""Measurements on the disk, so that planning goes on after a kill."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from ..evaluation.lines import add_line, read_lines
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

    def __init__(self, folder: Path | None = None, identity: str = "") -> None:
        self.known: dict[str, Any] = {}
        self.path = None if folder is None else folder / FILE
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        first, *lines = read_lines(self.path) or [{}]
        if not first:
            add_line(self.path, {"identity": identity})
        elif first.get("identity") != identity:
            raise ValueError(f"{folder} holds measurements of another model, other documents or options; give another")
        self.known = {line["key"]: line["value"] for line in lines}

    def __contains__(self, key: str) -> bool:
        return key in self.known

    def loss(self, key: str) -> Loss:
        return Loss(*self.known[key])

    def add(self, key: str, value: Any) -> None:
        self.known[key] = value
        if self.path is not None:
            add_line(self.path, {"key": key, "value": value})

    def tensors(self, key: str, make: Callable[[], tuple[torch.Tensor, ...]]) -> tuple[torch.Tensor, ...]:
        """Return the tensors that are known by a key, or else those that are made now, in double precision."""
        if key not in self:
            self.add(key, [tensor.tolist() for tensor in make()])
        return tuple(torch.tensor(value, dtype=torch.float64) for value in self.known[key])


def fingerprint(*parts: torch.Tensor | str) -> str:
    """Return a digest of texts and the values of tensors."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode() if isinstance(part, str) else part.double().numpy().tobytes())
        digest.update(b"\0")
    return digest.hexdigest()[:16]


def identity_of(model: PreTrainedModel, probes: Sequence[Probe]) -> str:
    """Return a digest of the model and the calibration texts."""
    digest = hashlib.sha256(f"{Loss._fields}".encode())
    digest.update(json.dumps(model.config.to_dict(), sort_keys=True, default=str).encode())
    for name, parameter in model.named_parameters():
        digest.update(f"{name} {parameter.dtype} {float(parameter.detach().sum(dtype=torch.float64))}".encode())
    for probe in probes:
        digest.update(probe.ids.to(torch.int64).numpy().tobytes() + str(probe.start).encode())
    return digest.hexdigest()[:16]
