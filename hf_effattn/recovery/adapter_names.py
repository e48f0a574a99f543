"""Adapters by name: a folder, one that ships with the project, or a repository on the Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub.errors import HFValidationError

from .adapter_files import DESCRIPTION, FILES, read

SHIPPED = Path(__file__).parents[2] / "recipes" / "results" / "adapters"  # in a clone; a wheel has none


def local(name: str | Path) -> Path:
    """Return the folder itself if it is there, else the shipped adapter `<model>/<name>`, else a copy of the
    repository of this name on the Hub.

    Raises:
        FileNotFoundError: if there is none of these; the message lists the shipped ones.
    """
    if Path(name).is_dir():
        return Path(name)
    if str(name) in (known := shipped()):
        return known[str(name)]
    try:
        return Path(huggingface_hub.snapshot_download(str(name), allow_patterns=list(FILES)))
    except HFValidationError:
        reason = "no repository can have this name"
    except (OSError, ValueError) as error:  # what the Hub's client raises, offline or for an unknown repository
        reason = f"no such repository could be fetched from the Hub: {error}"
    raise FileNotFoundError(f"there is no folder {str(name)!r}, and {reason}\n{_what_ships()}")


def shipped() -> dict[str, Path]:
    """Return the folders of the adapters that ship with the project, by name (`<model>/<name>`)."""
    folders = sorted(path.parent for path in SHIPPED.glob(f"*/*/{DESCRIPTION}"))
    return {folder.relative_to(SHIPPED).as_posix(): folder for folder in folders}


def push_adapter(folder: str | Path, repo_id: str) -> Any:
    """Upload what `save_adapter` wrote to a repository on the Hub, which is made if needed.

    Returns:
        What `huggingface_hub.upload_folder` returns.

    Raises:
        FileNotFoundError: for a missing file.
        ValueError: for files that `load_adapter` would refuse for every model.
    """
    read(Path(folder)).check_whole()
    huggingface_hub.create_repo(repo_id, exist_ok=True)
    return huggingface_hub.upload_folder(repo_id=repo_id, folder_path=str(folder), allow_patterns=list(FILES))


def _what_ships() -> str:
    if SHIPPED.is_dir():
        return f"Shipped adapters: {', '.join(shipped()) or 'none'}"
    return f"Shipped adapters come with a clone of the repository only (there is no {SHIPPED}); give a folder instead"
