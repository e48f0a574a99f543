"""The options of each mechanism, as frozen dataclasses that go into `config.json` and come back from it."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, ClassVar

from .feature_maps import FEATURE_MAPS, map_options
from .notation import whole_number
from .patterns import PATTERNS, Pattern, make_pattern, pattern_from_spec
from .patterns.base import is_registered, pattern_options, with_seed
from .recurrences import RECURRENCES
from .registry import Registry

# Ways of joining a softmax window and the linear past, and where the learned bias of a head starts. In log space the
# linear part starts nearly closed, since untrained features cost quality; training opens it.
JOINS = {"log": -4.0, "lolcats": -2.197}

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
        _refuse_unknown(options, cls.options(), f"{cls.mechanism} attention")
        return cls(**options)

    def for_layer(self, index: int) -> MechanismConfig:
        """Return the config for one layer: patterns that draw at random draw anew in each."""
        return self

    def to_dict(self) -> dict[str, Any]:
        """Return the config as JSON-able data; `config_from_dict` reads it."""
        return {"mechanism": self.mechanism, **asdict(self)}


@CONFIGS.register("linear")
@dataclass(frozen=True, kw_only=True)
class LinearConfig(MechanismConfig):
    """Options of linear attention: a recurrent state in place of the KV cache, optionally with a softmax window.

    Args:
        feature_map: Name of the feature map φ.
        map_options: Options of this feature map's own, such as `{"feature_dim": 32}`; `convert_attention` and
            `from_options` also take them one by one, as keywords.
        window: Visible keys of the softmax window, the query's own included; 0 for none. Keys that leave the window
            enter the linear state.
        num_sinks: First tokens of each row that stay in the softmax branch for good; needs a window. None for 4 with
            a window, and none without.
        join: How window and linear past are weighed: "log" puts both on one scale and starts with the linear part
            nearly closed; "lolcats" is the weighing of LoLCATs (equations in `hf_effattn.ops.hybrid.merge`).
        recurrence: How the state goes from token to token: "sum" keeps everything, others let it decay (see
            `hf_effattn.recurrences`).
        chunk_size: Tokens of one chunk of the parallel form. It changes speed and rounding, nothing else.
        backend: "auto", "chunked", or "reference" (slow and quadratic: for tests).
    """

    mechanism: ClassVar[str] = "linear"
    backends: ClassVar[tuple[str, ...]] = ("auto", "chunked", "reference")

    feature_map: str = "hedgehog"
    map_options: dict[str, Any] = field(default_factory=dict, hash=False)
    window: int = 64
    num_sinks: int | None = None
    join: str = "log"
    recurrence: str = "sum"
    chunk_size: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.map_options, dict):
            raise TypeError(f"map_options must be a dictionary; got {self.map_options!r}")
        _refuse_unknown(self.map_options, map_options(self.feature_map), f"feature map {self.feature_map!r}")
        if self.recurrence != "sum" and self.recurrence not in RECURRENCES:
            raise ValueError(f"unknown recurrence {self.recurrence!r}; valid: sum, {', '.join(RECURRENCES)}")
        if self.join not in JOINS:
            raise ValueError(f"unknown join {self.join!r}; valid: {', '.join(JOINS)}")
        whole_number("window", self.window, 0)
        if self.num_sinks is None:
            object.__setattr__(self, "num_sinks", 4 if self.window else 0)
        whole_number("num_sinks", self.num_sinks, 0)
        whole_number("chunk_size", self.chunk_size, 1)
        if self.num_sinks and not self.window:
            raise ValueError(
                f"num_sinks={self.num_sinks} needs a softmax window; set window to at least 1, or num_sinks=0"
            )

    @property
    def kind(self) -> str:
        return "hybrid" if self.window else "linear"

    @classmethod
    def from_options(cls, options: dict[str, Any]) -> MechanismConfig:
        """Build from keywords; options of the feature map may be among them."""
        name = options.get("feature_map", cls.feature_map)
        valid = map_options(name) if name in FEATURE_MAPS else []
        _refuse_unknown(options, [*cls.options(), *valid], f"linear attention with feature map {name!r}")
        own = {key: value for key, value in options.items() if key in valid}
        if own:
            given = {key: value for key, value in options.items() if key not in own}
            options = {**given, "map_options": {**given.get("map_options", {}), **own}}
        return super().from_options(options)


@CONFIGS.register("sparse")
@dataclass(frozen=True, kw_only=True)
class SparseConfig(MechanismConfig):
    """Options of sparse attention: softmax over the keys that a pattern shows, and a cache that keeps no more.

    Args:
        pattern: Name of a registered pattern, or a `Pattern` such as `sliding_window(64) | sinks(4)`.
        window, num_sinks, positions, stride, num_summary, group_size, block_size, num_random, seed: Options of the
            named pattern; which of them it takes, and what they mean, its factory in `hf_effattn.patterns` says. None
            leaves the factory's default.
        backend: "auto", "banded" (windows and sinks only), "gathered" (any pattern whose keys are known beforehand, on
            a CPU), "masked" (any pattern, in the time of dense attention), or "reference" (slow: for tests).
    """

    mechanism: ClassVar[str] = "sparse"
    backends: ClassVar[tuple[str, ...]] = ("auto", "banded", "gathered", "masked", "reference")

    pattern: str | Pattern = "streaming"
    window: int | Sequence[int] | None = None
    num_sinks: int | None = None
    positions: Sequence[int] | None = None
    stride: int | None = None
    num_summary: int | None = None
    group_size: int | None = None
    block_size: int | None = None
    num_random: int | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("positions", "window"):
            if isinstance(getattr(self, name), Sequence):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        pattern = self.resolve()
        if self.backend == "banded" and not pattern.is_windowed:
            raise ValueError(
                f"backend 'banded' computes windows, with or without sinks; {pattern.describe()} is none: "
                "use 'auto', 'masked' or 'reference'"
            )

    def resolve(self) -> Pattern:
        """Return the pattern these options describe."""
        names = (name for name in self.options() if name not in ("pattern", "backend"))
        given = {name: value for name in names if (value := getattr(self, name)) is not None}
        if isinstance(self.pattern, str):
            return make_pattern(self.pattern, given)
        if not isinstance(self.pattern, Pattern):
            raise TypeError(f"pattern must be a Pattern or one of {PATTERNS.names()}; got {self.pattern!r}")
        if not is_registered(self.pattern.spec):
            raise ValueError(
                f"{self.pattern.describe()} has a part made by hand, which cannot be saved; make patterns in a factory "
                "under @register_pattern(name)"
            )
        if given:
            raise ValueError(f"{sorted(given)} belong to named patterns; {self.pattern.describe()} has its own")
        return self.pattern

    def for_layer(self, index: int) -> MechanismConfig:
        spec = with_seed(self.resolve().spec, index)
        return self if spec is None else SparseConfig(pattern=pattern_from_spec(spec), backend=self.backend)

    def to_dict(self) -> dict[str, Any]:
        return {"mechanism": self.mechanism, "pattern": copy.deepcopy(self.resolve().spec), "backend": self.backend}

    @classmethod
    def from_options(cls, options: dict[str, Any]) -> MechanismConfig:
        """Build from keywords; a registered pattern may have options that are no fields of this class."""
        name = options.get("pattern", cls.pattern)
        own = [key for key in options if key not in cls.options()]
        if own and name in PATTERNS and set(own) <= pattern_options(name):
            given = {key: value for key, value in options.items() if key not in ("pattern", "backend")}
            options = {"pattern": make_pattern(name, given), "backend": options.get("backend", "auto")}
        return super().from_options(options)


def _refuse_unknown(options: Iterable[str], valid: list[str], what: str) -> None:
    unknown = [name for name in options if name not in valid]
    if unknown:
        raise ValueError(f"unknown option {unknown[0]!r} of {what}; valid: {', '.join(valid) or 'none'}")


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
