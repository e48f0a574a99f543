"""The files of adapter-only checkpoints: written whole or not at all, and read with what is wrong by name.

`effattn.json` says what each layer became, and of which model; `effattn.safetensors` has the learned parameters; two
files of PEFT's own format stand beside them if the model carried an adapter. What PEFT's file holds of `.effattn.`
parameters, for `modules_to_save=["effattn"]`, stands only there.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from peft import PeftConfig
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ..integration import FORMAT_VERSION as CONVERSION_VERSION
from ..integration import is_learned

Tensors = dict[str, torch.Tensor]
FORMAT_VERSION = 1
DESCRIPTION = "effattn.json"
WEIGHTS = "effattn.safetensors"
PEFT_WEIGHTS = SAFETENSORS_WEIGHTS_NAME
FILES = (WEIGHTS, PEFT_WEIGHTS, CONFIG_NAME, DESCRIPTION)  # in the order they are put in place
FIELDS = ("base_model", "model_type", "num_layers", "dtype", "peft", "effattn", "heads", "sha256")
PEFT_PREFIX = "base_model.model."  # of names in PEFT's file
NAMED = 4  # keys that an error names, of each kind


class Saved(NamedTuple):
    """An adapter-only checkpoint as it was read.

    Args:
        folder: Where it is.
        description: What `effattn.json` says.
        own: The tensors of `effattn.safetensors`, by their names in the converted model.
        peft: Those of PEFT's file; None for a checkpoint without.
    """

    folder: Path
    description: dict[str, Any]
    own: Tensors
    peft: Tensors | None

    @property
    def layers(self) -> list[dict[str, Any] | None]:
        """What each layer became; None for those that stayed as they were."""
        return self.description["effattn"]["layers"]

    @property
    def learned(self) -> Tensors:
        """All parameters of mechanisms, whichever file holds them."""
        return self.own | {key.removeprefix(PEFT_PREFIX): x for key, x in (self.peft or {}).items() if is_learned(key)}

    def check_keys(self, file: str, given: Tensors, expected: Tensors) -> None:
        """Raise a ValueError that names what `given`, from `file`, lacks, has beyond `expected`, or in other shapes."""
        wrong = [
            f"{key} ({list(x.shape)} instead of {list(expected[key].shape)})"
            for key, x in given.items()
            if key in expected and x.shape != expected[key].shape
        ]
        kinds = {
            "lacks": expected.keys() - given.keys(),
            "has what the model has not:": given.keys() - expected.keys(),
            "has other shapes than the model:": wrong,
        }
        problems = [f"{kind} {_some(keys)}" for kind, keys in kinds.items() if keys]
        if problems:
            raise ValueError(f"{self.folder / file} {'; '.join(problems)}")

    def check_whole(self) -> None:
        """Raise a ValueError if files of two saves are mixed, as after an interrupted one."""
        found = _digests(self.folder, self.description["sha256"])
        mixed = [name for name, digest in self.description["sha256"].items() if found[name] != digest]
        if mixed:
            raise ValueError(f"{self.folder / mixed[0]} is not the one that was saved with {DESCRIPTION}; save again")


def write(folder: Path, description: dict[str, Any], own: Tensors, peft: Tensors, config: PeftConfig | None) -> None:
    """Write a checkpoint into `folder`, under other names first; what an older one had beyond it goes."""
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder, prefix=".effattn-") as name:
        temporary = Path(name)
        save_file(_apart(own), temporary / WEIGHTS, {"format": "pt"})
        if config is not None:
            save_file(_apart(peft), temporary / PEFT_WEIGHTS, {"format": "pt"})
            config.save_pretrained(str(temporary))
        digests = _digests(temporary, [WEIGHTS, PEFT_WEIGHTS] if config is not None else [WEIGHTS])
        data = {"version": FORMAT_VERSION, **description, "peft": config is not None, "sha256": digests}
        (temporary / DESCRIPTION).write_text(json.dumps(data, indent=2) + "\n")
        stale = _stale(folder) if config is None else []
        for file in FILES:
            if (temporary / file).exists():
                os.replace(temporary / file, folder / file)
    for path in stale:
        path.unlink(missing_ok=True)


def read(folder: Path) -> Saved:
    """Read what `write` wrote.

    Raises:
        FileNotFoundError: for a missing file.
        ValueError: for a file that cannot be read, and another format.
    """
    description = _read_description(folder)
    own = _read_tensors(folder / WEIGHTS)
    if not description["peft"]:
        return Saved(folder, description, own, None)
    _present(folder / CONFIG_NAME)
    return Saved(folder, description, own, _read_tensors(folder / PEFT_WEIGHTS))


def _read_description(folder: Path) -> dict[str, Any]:
    path = _present(folder / DESCRIPTION)
    try:
        data = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
    version = data.get("version") if isinstance(data, dict) else None
    if version != FORMAT_VERSION:
        raise ValueError(f"{path} is of format {version!r}; this hf_effattn reads format {FORMAT_VERSION}")
    lacking = [field for field in FIELDS if field not in data]
    if lacking:
        raise ValueError(f"{path} lacks {', '.join(lacking)}")
    version = data["effattn"].get("version")
    if version != CONVERSION_VERSION:
        raise ValueError(
            f"the conversion in {path} is of format {version!r}; this hf_effattn reads format {CONVERSION_VERSION}"
        )
    return data


def _read_tensors(path: Path) -> Tensors:
    try:
        return load_file(_present(path))
    except SafetensorError as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def _present(path: Path) -> Path:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; the files of an adapter are those that save_adapter wrote")
    return path


def _apart(tensors: Tensors) -> Tensors:
    """Return copies that share no memory, as safetensors wants them."""
    return {key: value.detach().cpu().clone(memory_format=torch.contiguous_format) for key, value in tensors.items()}


def _digests(folder: Path, names: Iterable[str]) -> dict[str, str]:
    return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names}


def _stale(folder: Path) -> list[Path]:
    """Return the files of PEFT's that belong to the checkpoint in `folder`, if there is one."""
    try:
        had = _read_description(folder)["peft"]
    except (OSError, ValueError):
        had = False  # then they are someone else's
    return [folder / PEFT_WEIGHTS, folder / CONFIG_NAME] if had else []


def _some(keys: Iterable[str]) -> str:
    named = sorted(keys)
    more = f" and {len(named) - NAMED} more" if len(named) > NAMED else ""
    return ", ".join(named[:NAMED]) + more
