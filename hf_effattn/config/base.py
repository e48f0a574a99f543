"""What the options of all mechanisms share, and the registry of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar

from ..registry import Registry

CONFIGS: Registry[type[MechanismConfig]] = Registry("mechanism")


@dataclass(frozen=True, kw_only=True)
class MechanismConfig:
    """What the options of all mechanisms share.

    Args:
        backend: Which code computes the attention. "auto" chooses; an explicit name never falls back to another.
    """

    mechanism: ClassVar[str]
    backends: ClassVar[tuple[str, ...]]

    backend: str = "auto"

    def __post_init__(self) -> None:
        if self.backend not in self.backends:
            valid = ", ".join(self.backends)
            raise ValueError(f"unknown backend {self.backend!r} of {self.mechanism} attention; valid: {valid}")

    @property
    def kind(self) -> str:
        """Name of the class that computes it, in `hf_effattn.attention.MECHANISMS`."""
        return self.mechanism

    @classmethod
    def options(cls) -> list[str]:
        return [field.name for field in fields(cls)]

    @classmethod
    def from_options(cls, options: dict[str, Any]) -> MechanismConfig:
        """Build from keywords, with an error that names the valid ones."""
        refuse_unknown(options, cls.options(), f"{cls.mechanism} attention")
        return cls(**options)

    def for_layer(self, index: int) -> MechanismConfig:
        """Return the config for one layer: patterns that draw at random draw anew in each."""
        return self

    def to_dict(self) -> dict[str, Any]:
        """Return the config as JSON-able data; `config_from_dict` reads it."""
        return {"mechanism": self.mechanism, **asdict(self)}


def refuse_unknown(options: Iterable[str], valid: list[str], what: str) -> None:
    """Raise a ValueError that names the valid options if there are others."""
    unknown = [name for name in options if name not in valid]
    if unknown:
        raise ValueError(f"unknown option {unknown[0]!r} of {what}; valid: {', '.join(valid) or 'none'}")
