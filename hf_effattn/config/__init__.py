"""The options of each mechanism, as frozen dataclasses that go into `config.json` and come back from it."""

from __future__ import annotations

from typing import Any

from ..patterns import pattern_from_spec
from .base import CONFIGS, MechanismConfig
from .linear import JOINS, LinearConfig
from .sparse import SparseConfig

__all__ = ["CONFIGS", "JOINS", "LinearConfig", "MechanismConfig", "SparseConfig", "config_from_dict", "make_config"]


def make_config(mechanism: str | MechanismConfig, options: dict[str, Any]) -> MechanismConfig:
    """Build the config of `mechanism` from its name and options; a config passes through, if no options come with it.

    Raises:
        ValueError: for an unknown mechanism, option or value; the message names the valid ones.
        TypeError: for a value of the wrong type.
    """
    if isinstance(mechanism, MechanismConfig):
        if options:
            raise ValueError(f"options {sorted(options)} cannot be joined to a config; put them into the config")
        return mechanism
    return CONFIGS.get(mechanism).from_options(options)


def config_from_dict(data: dict[str, Any]) -> MechanismConfig:
    """Read back what `MechanismConfig.to_dict` wrote."""
    options = {key: value for key, value in data.items() if key != "mechanism"}
    if isinstance(options.get("pattern"), dict):
        options["pattern"] = pattern_from_spec(options["pattern"])
    return make_config(data["mechanism"], options)
