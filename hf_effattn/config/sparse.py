"""The options of sparse attention."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from ..evictions import EVICTIONS
from ..notation import whole_number
from ..patterns import PATTERNS, Pattern, make_pattern, pattern_from_spec
from ..patterns.base import is_registered, pattern_options, with_seed
from ..selectors import SELECTORS
from .base import CONFIGS, MechanismConfig

POSITION_MODES = ("absolute", "rolling")


@CONFIGS.register("sparse")
@dataclass(frozen=True, kw_only=True)
class SparseConfig(MechanismConfig):
    """Options of sparse attention: softmax over the keys that a pattern shows, and a cache that keeps no more.

    Args:
        pattern: Name of a registered pattern, or a `Pattern` such as `sliding_window(64) | sinks(4)`.
        window, num_sinks, positions, stride, num_summary, group_size, block_size, num_random, seed: Options of the
            named pattern; which of them it takes, and what they mean, its factory in `hf_effattn.patterns` says. None
            leaves the factory's default; in a list of windows, one for each query head or each key/value head, it is
            a head that sees and keeps every key.
        selector: Name of a selector, instead of a pattern: queries choose keys by content, as many as its options
            `block_size`, `num_blocks`, `num_columns`, `num_diagonals` say (see `hf_effattn.selectors`).
        eviction: Name of an eviction, instead of a pattern: the cache is reduced to `capacity` tokens after the prompt
            and while decoding (see `hf_effattn.evictions`).
        position_mode: "absolute", or "rolling" for windows with sinks, which lets rotary models read on without end
            (see `hf_effattn.attention.rolling`).
        backend: "auto", "banded" (windows and sinks only), "gathered" (any pattern whose keys are known beforehand, on
            a CPU), "flex" (any pattern, by a kernel that PyTorch compiles for CUDA; "auto" does not choose it yet),
            "masked" (any pattern, in the time of dense attention), or "reference" (slow: for tests).
    """

    mechanism: ClassVar[str] = "sparse"
    backends: ClassVar[tuple[str, ...]] = ("auto", "banded", "gathered", "flex", "masked", "reference")

    pattern: str | Pattern = "streaming"
    window: int | Sequence[int | None] | None = None
    num_sinks: int | None = None
    positions: Sequence[int] | None = None
    stride: int | None = None
    num_summary: int | None = None
    group_size: int | None = None
    block_size: int | None = None
    num_random: int | None = None
    seed: int | None = None
    selector: str | None = None
    num_blocks: int | None = None
    num_columns: int | None = None
    num_diagonals: int | None = None
    eviction: str | None = None
    capacity: int | None = None
    position_mode: str = "absolute"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("positions", "window"):
            if isinstance(getattr(self, name), Sequence):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        if self.position_mode not in POSITION_MODES:
            raise ValueError(f"unknown position_mode {self.position_mode!r}; valid: {', '.join(POSITION_MODES)}")
        if self.selector is not None:
            self.selection()
        if self.eviction is not None:
            self.kept()
        if self.selector is not None or self.eviction is not None:
            return
        pattern = self.resolve()
        if self.kind == "rolling" and not (pattern.is_windowed and pattern.band and pattern.band.num_sinks):
            raise ValueError(
                f"position_mode='rolling' is for windows with sinks; {pattern.describe()} is none that all heads share"
            )
        if self.kind == "rolling" and self.backend not in ("auto", "banded"):
            raise ValueError(f"unknown backend {self.backend!r} of rolling positions; valid: auto, banded")
        if self.backend == "banded" and self.kind == "sparse" and not pattern.is_windowed:
            raise ValueError(
                f"backend 'banded' computes windows, with or without sinks; {pattern.describe()} is none: "
                "use 'auto', 'masked' or 'reference'"
            )

    @property
    def kind(self) -> str:
        if self.selector is not None:
            return SELECTORS.get(self.selector).kind
        if self.eviction is not None:
            return "evicting"
        if self.position_mode == "rolling":
            return "rolling"
        return "sparse" if self.resolve().num_heads is None else "by_head"

    def selection(self) -> dict[str, int]:
        """Return the options of the selector."""
        assert self.selector is not None
        selector = SELECTORS.get(self.selector)
        self._refuse_others(f"selector {self.selector!r}", tuple(selector.options), selector.backends)
        options = {name: getattr(self, name) for name in selector.options}
        options = {name: selector.options[name] if value is None else value for name, value in options.items()}
        selector.check(options)
        return options

    def kept(self) -> int:
        """Return the capacity of the eviction."""
        EVICTIONS.get(self.eviction or "")
        self._refuse_others(f"eviction {self.eviction!r}", ("capacity",), ("auto", "masked"))
        if self.capacity is None:
            raise ValueError(f"eviction {self.eviction!r} needs a capacity: the tokens a cache keeps")
        return whole_number("capacity", self.capacity, 2)

    def _refuse_others(self, kind: str, valid: tuple[str, ...], backends: tuple[str, ...]) -> None:
        """Raise a ValueError for options that do not belong to a selector or an eviction."""
        wrong = [name for name in self._given() if name not in valid]
        wrong += [] if self.pattern == type(self).pattern else ["pattern"]
        wrong += [] if self.position_mode == "absolute" else ["position_mode"]
        if wrong:
            raise ValueError(f"{wrong[0]} does not go with {kind}, which takes {', '.join(valid)}")
        if self.backend not in backends:
            raise ValueError(f"unknown backend {self.backend!r} of {kind}; valid: {', '.join(backends)}")

    def _given(self) -> dict[str, Any]:
        """The options of pattern or selector that are not left to their defaults."""
        own = "selector" if self.selector is not None else "eviction"
        names = (name for name in self.options() if name not in ("pattern", "backend", "position_mode", own))
        return {name: value for name in names if (value := getattr(self, name)) is not None}

    def resolve(self) -> Pattern:
        """Return the pattern these options describe."""
        given = self._given()
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
        if self.kind not in ("sparse", "by_head"):
            return self
        spec = with_seed(self.resolve().spec, index)
        return self if spec is None else SparseConfig(pattern=pattern_from_spec(spec), backend=self.backend)

    def to_dict(self) -> dict[str, Any]:
        chosen: dict[str, Any]
        if self.selector is not None:
            chosen = {"selector": self.selector, **self.selection()}
        elif self.eviction is not None:
            chosen = {"eviction": self.eviction, "capacity": self.kept()}
        else:
            chosen = {"pattern": copy.deepcopy(self.resolve().spec)}
            if self.kind == "rolling":
                chosen["position_mode"] = self.position_mode
        return {"mechanism": self.mechanism, **chosen, "backend": self.backend}

    @classmethod
    def from_options(cls, options: dict[str, Any]) -> MechanismConfig:
        """Build from keywords; a registered pattern may have options that are no fields of this class."""
        name = options.get("pattern", cls.pattern)
        own = [key for key in options if key not in cls.options()]
        if own and name in PATTERNS and set(own) <= pattern_options(name):
            given = {k: v for k, v in options.items() if k not in ("pattern", "backend", "position_mode")}
            kept = {k: v for k, v in options.items() if k in ("backend", "position_mode")}
            options = {**kept, "pattern": make_pattern(name, given)}
        return super().from_options(options)
