"""What a checkpoint must hold to be loaded into a converted model."""

from __future__ import annotations

import os
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

TYPE_PREFIX = "effattn_"  # of the model type of converted models


def is_learned(key: str) -> bool:
    """Whether `key` names a parameter of a mechanism, in a state dict of the model or of what PEFT made of it."""
    return ".effattn." in key


def check_keys(model: PreTrainedModel, path: Any, info: dict[str, Any], kwargs: dict[str, Any]) -> None:
    """Raise for missing or unexpected parameters of mechanisms, unless the checkpoint is that of a softmax model, or
    lacks the other parameters of their layers too (of which transformers warns).

    Args:
        info: What transformers tells of the loading: `missing_keys` and `unexpected_keys`.
        kwargs: Arguments of `from_pretrained`.
    """
    unexpected = sorted(key for key in info["unexpected_keys"] if is_learned(key))
    if unexpected:
        raise ValueError(f"the checkpoint {path} has parameters its config does not know: {', '.join(unexpected)}")
    missing = sorted(key for key in info["missing_keys"] if is_learned(key))
    if missing and path is not None and _is_converted_checkpoint(path, kwargs):
        loaded = model.state_dict().keys() - set(info["missing_keys"])
        missing = [key for key in missing if any(other.startswith(key.partition("effattn.")[0]) for other in loaded)]
        if missing:
            raise ValueError(f"the converted checkpoint {path} lacks parameters: {', '.join(missing)}")


def _is_converted_checkpoint(path: Any, kwargs: dict[str, Any]) -> bool:
    names = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")
    options = {name: kwargs[name] for name in names if name in kwargs}
    data, _ = PreTrainedConfig.get_config_dict(os.fspath(path), **options)
    return str(data.get("model_type", "")).startswith(TYPE_PREFIX)
