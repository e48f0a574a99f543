"""The options of linear attention."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from ..feature_maps import FEATURE_MAPS, map_options
from ..notation import whole_number
from ..recurrences import RECURRENCES
from .base import CONFIGS, MechanismConfig, refuse_unknown

# Ways of joining a softmax window and the linear past, and where the learned bias of a head starts. In log space the
# linear part starts nearly closed, since untrained features cost quality; training opens it.
JOINS = {"log": -4.0, "lolcats": -2.197}


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
            nearly closed; "lolcats" is the weighing of LoLCATs (equations in `hf_effattn.ops.hybrid.logit`).
        recurrence: How the state goes from token to token: "sum" keeps everything, others let it decay (see
            `hf_effattn.recurrences`).
        chunk_size: Tokens of one chunk of the parallel form. It changes speed and rounding, nothing else.
        backend: "auto", "chunked", "reference" (slow and quadratic: for tests), or "triton" (kernels for CUDA devices,
            for layers without a window and recurrences without delta rule).
    """

    mechanism: ClassVar[str] = "linear"
    backends: ClassVar[tuple[str, ...]] = ("auto", "chunked", "reference", "triton")

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
        refuse_unknown(self.map_options, map_options(self.feature_map), f"feature map {self.feature_map!r}")
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
        if self.backend == "triton":
            self._check_triton()

    def _check_triton(self) -> None:
        """Raise a ValueError for what has no Triton kernels."""
        others = ", ".join(name for name in self.backends if name != "triton")
        if self.window:
            raise ValueError(
                f"backend 'triton' has no softmax window; set window=0, or with window={self.window} another backend; "
                f"valid: {others}"
            )
        if self.recurrence != "sum" and RECURRENCES.get(self.recurrence).delta:
            raise ValueError(f"backend 'triton' has no delta rule, as of {self.recurrence!r}; valid: {others}")

    @property
    def kind(self) -> str:
        return "hybrid" if self.window else "linear"

    @classmethod
    def from_options(cls, options: dict[str, Any]) -> MechanismConfig:
        """Build from keywords; options of the feature map may be among them."""
        name = options.get("feature_map", cls.feature_map)
        valid = map_options(name) if name in FEATURE_MAPS else []
        refuse_unknown(options, [*cls.options(), *valid], f"linear attention with feature map {name!r}")
        own = {key: value for key, value in options.items() if key in valid}
        if own:
            given = {key: value for key, value in options.items() if key not in own}
            options = {**given, "map_options": {**given.get("map_options", {}), **own}}
        return super().from_options(options)
