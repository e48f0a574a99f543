"""The attentions among which a plan chooses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from ..config import MechanismConfig, SparseConfig, make_config
from ..evaluation.variants import ADAPTER, Variant
from ..plans import DENSE
from ..plans.heads import WINDOWED

PARTS = (32, 8, 4)  # of the context: the windows of the default candidates
NUM_SINKS = 4


@dataclass(frozen=True)
class Candidate:
    """One attention that layers may get.

    Args:
        name: In tables.
        config: None for a layer left as it is.
    """

    name: str
    config: MechanismConfig | None

    @property
    def spec(self) -> dict[str, Any] | None:
        """The config as JSON-able data."""
        return None if self.config is None else self.config.to_dict()


def default_candidates(context_length: int) -> list[str | MechanismConfig]:
    """Return dense attention and windows with sinks of a 32nd, an eighth and a quarter of the context."""
    windows = [max(context_length // part - NUM_SINKS, 1) for part in PARTS]
    return [DENSE, *(f"sparse:window={window},num_sinks={NUM_SINKS}" for window in sorted(set(windows)))]


def read_candidates(given: Sequence[str | MechanismConfig]) -> list[Candidate]:
    """Return candidates as users name them: "dense", "sparse:window=512,num_sinks=4", or configs. Dense attention,
    with which all is compared, is always among them.

    Raises:
        TypeError, ValueError: for what is no candidate, and names that come twice.
    """
    if isinstance(given, (str, MechanismConfig)):
        raise TypeError(f"candidates are a list; got {given!r}")
    found = [_candidate(one) for one in given]
    if DENSE not in [candidate.name for candidate in found]:
        found.insert(0, Candidate(DENSE, None))
    names = [candidate.name for candidate in found]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise ValueError(f"{twice[0]!r} is among the candidates twice")
    if len(found) < 2:
        raise ValueError("a plan needs candidates besides dense attention, such as 'sparse:window=512,num_sinks=4'")
    return found


def check_for_heads(candidates: Sequence[Candidate]) -> None:
    """Raise a ValueError if these are no candidates for single heads: those of a layer may differ in the lengths of
    their windows, and in nothing else."""
    rests = []
    for candidate in candidates:
        spec = candidate.spec
        if spec is None:
            continue
        pattern = spec.get("pattern", {})
        if pattern.get("name") not in WINDOWED or not isinstance(pattern["window"], int):
            raise ValueError(f"{candidate.name!r} is for whole layers; heads may have windows, with or without sinks")
        rests.append({**spec, "pattern": {**pattern, "window": None}})
    if any(rest != rests[0] for rest in rests):
        raise ValueError("the windows of heads must have the same sinks and the same backend")


def _candidate(given: str | MechanismConfig) -> Candidate:
    if isinstance(given, MechanismConfig):
        return Candidate(_name(given), given)
    if not isinstance(given, str):
        raise TypeError(f"a candidate is a name such as 'dense' or 'sparse:window=512', or a config; got {given!r}")
    variant = Variant.parse(given)
    if variant.mechanism == DENSE:
        return Candidate(DENSE, None)
    if variant.mechanism == ADAPTER:
        raise ValueError(
            f"{given!r} is trained for the layers that it has; plan first, then train what the plan converts"
        )
    wrong = [name for name in ("layers", "keep_softmax") if name in variant.options]
    if wrong:
        raise ValueError(f"{given!r} names {wrong[0]}, which the plan is there to choose")
    config = make_config(str(variant.mechanism), variant.options)
    if isinstance(config, SparseConfig) and config.eviction is not None:
        raise ValueError(
            f"{given!r} evicts after the prompt, which a likelihood does not see: its losses can't be measured"
        )
    return Candidate(given, config)


def _name(config: MechanismConfig) -> str:
    values = ((field, getattr(config, field.name)) for field in fields(config))
    given = [f"{field.name}={value}" for field, value in values if value not in (field.default, None, {})]
    return config.mechanism + (":" if given else "") + ",".join(given)
