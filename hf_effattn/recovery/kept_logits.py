"""Logits of a teacher in files, so that it reads each text once."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import load_file, save_file

from ..notation import whole_number
from .losses import TopK


class KeptLogits:
    """The largest logits of a teacher, in a file for each text, which is there whole or not at all.

    Args:
        folder: Made when it is needed.
        number: Logits of a token that are kept.
        temperature: At which they are taken.
        teacher: Tells it from others whose logits are in the folder.

    Raises:
        ValueError: if `number` is not at least 1.
    """

    def __init__(self, folder: str | Path, number: int, temperature: float = 1.0, teacher: str = "") -> None:
        whole_number("number", number, 1)
        self.folder, self.number, self.temperature, self.teacher = Path(folder), number, temperature, teacher

    def get(self, input_ids: torch.Tensor) -> TopK | None:
        """Return what is kept of texts `[B, T]`; None if any of them is missing."""
        paths = [self._path(row) for row in input_ids]
        if not all(path.exists() for path in paths):
            return None
        rows = [load_file(path) for path in paths]
        values, indices = (torch.stack([row[name] for row in rows]) for name in ("values", "indices"))
        return TopK(values.to(input_ids.device), indices.to(input_ids.device).long())

    def put(self, input_ids: torch.Tensor, logits: torch.Tensor) -> TopK:
        """Keep the largest of the logits `[B, T, V]` of texts `[B, T]`, and return them."""
        best = TopK.of(logits, self.number, self.temperature)
        for ids, values, indices in zip(input_ids, best.values.cpu(), best.indices.int().cpu(), strict=True):
            path = self._path(ids)
            path.parent.mkdir(parents=True, exist_ok=True)
            with TemporaryDirectory(dir=path.parent, prefix=".") as partial:
                save_file({"values": values.contiguous(), "indices": indices.contiguous()}, Path(partial, path.name))
                os.replace(Path(partial, path.name), path)
        return best

    def _path(self, ids: torch.Tensor) -> Path:
        text = hashlib.sha256(f"{self.teacher} {self.number} {self.temperature} {ids.tolist()}".encode())
        return self.folder / f"{text.hexdigest()[:32]}.safetensors"
