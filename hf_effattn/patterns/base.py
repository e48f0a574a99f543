"""What a pattern is: an index predicate, what a cache must keep for it, and how both compose."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from ..notation import whole_number
from ..registry import Registry
from .drawing import Drawing
from .parts import MaskMod, Parts, union
from .retention import Retention


@dataclass(frozen=True)
class Band:
    """A pattern that is exactly a sliding window joined with the first tokens: key k ≤ q is visible to query q iff
    `q − k < window` or `k < num_sinks`. The banded backend computes these without a T×S matrix. A window of None shows
    every key, sinks among them, so that it has none of its own."""

    window: int | None
    num_sinks: int = 0

    def __or__(self, other: Band) -> Band:
        if self.window is None or other.window is None:
            return Band(None)
        return Band(max(self.window, other.window), max(self.num_sinks, other.num_sinks))

    def __and__(self, other: Band) -> Band | None:
        """Return the band of what both show; None where it is none."""
        if self.num_sinks or other.num_sinks:
            return None
        return Band(min((x.window for x in (self, other) if x.window is not None), default=None))


@dataclass(frozen=True)
class Pattern:
    """Which past keys a query sees, told by positions alone.

    The one predicate feeds the dense reference, the block masks and (through `retention`) the eviction of the cache.
    `a | b` sees what either sees, `a & b` what both see.

    Args:
        mask_mod: `mask_mod(b, h, q, k) -> bool` on integer index tensors that broadcast (FlexAttention's signature);
            q and k are positions from the first real token of the row. It implies `k <= q`.
        retention: What a cache must keep; `mask_mod(b, h, q, k)` implies `retention.keeps(q, k)`.
        band: The same predicate as a window and sinks where it is one, else None.
        spec: Name and options as JSON-able data, from which `pattern_from_spec` builds the pattern again.
        parts: The same predicate as a sum of parts whose keys are found without looking at all of them; none for a
            pattern that does not say.
        num_heads: Query heads it is made for; None for any number.
        for_heads: `for_heads((2, 3))` is what these heads see, as a pattern for them alone. None where heads may differ
            in a way that nobody told: then a layer cannot take its heads apart.
    """

    mask_mod: MaskMod = field(compare=False, repr=False)
    retention: Retention = field(default_factory=Retention)
    band: Band | None = None
    spec: dict[str, Any] = field(default_factory=dict, hash=False)
    parts: Parts = field(default=(), compare=False, repr=False)
    num_heads: int | None = None
    for_heads: ForHeads | None = field(default=None, compare=False, repr=False)

    def __or__(self, other: Pattern) -> Pattern:
        first, second = self.mask_mod, other.mask_mod
        return Pattern(
            lambda b, h, q, k: first(b, h, q, k) | second(b, h, q, k),
            self.retention | other.retention,
            self.band | other.band if self.band and other.band else None,
            {"any": [self.spec, other.spec]},
            union(self.parts, other.parts),
            _same_heads(self, other),
            _each_for_heads(self, other, Pattern.__or__),
        )

    def __and__(self, other: Pattern) -> Pattern:
        first, second = self.mask_mod, other.mask_mod
        return Pattern(
            lambda b, h, q, k: first(b, h, q, k) & second(b, h, q, k),
            self.retention & other.retention,
            self.band & other.band if self.band and other.band else None,
            {"all": [self.spec, other.spec]},
            _intersection(self, other),
            _same_heads(self, other),
            _each_for_heads(self, other, Pattern.__and__),
        )

    @property
    def is_windowed(self) -> bool:
        """Whether the pattern is a window, with or without sinks, that the banded backend can compute."""
        return self.band is not None and self.band.window != 0

    def visible(self, query: torch.Tensor, key: torch.Tensor, num_heads: int = 1) -> torch.Tensor:
        """Return which keys the queries see, as booleans that broadcast to `[B, H, T, S]`.

        Args:
            query: Positions `[B, T]`.
            key: Positions `[B, S]`; negative ones are empty slots or padding, which nobody sees.
            num_heads: H, for patterns that differ by head.
        """
        b = torch.arange(query.shape[0], device=query.device)[:, None, None, None]
        h = torch.arange(num_heads, device=query.device)[None, :, None, None]
        q, k = query[:, None, :, None], key[:, None, None, :]
        return self.mask_mod(b, h, q, k) & (k >= 0)

    def num_visible(self, position: int) -> int:
        """Return how many keys the query at `position` (from 0) sees, its own included: in the head that sees most."""
        keys = torch.arange(position + 1)[None]
        return int(self.visible(torch.tensor([[position]]), keys, self.num_heads or 1).sum(dim=-1).max())

    def show(self, length: int = 48, head: int = 0) -> Drawing:
        """Draw what the queries of a text see: `print(pattern.show(48))`, `pattern.show(512).save("pattern.png")`.

        Args:
            length: Tokens of the text.
            head: Query head, for patterns that differ by head.
        """
        whole_number("length", length, 1)
        heads = self.num_heads or whole_number("head", head, 0) + 1
        if head not in range(heads):
            raise ValueError(f"head must be one of 0 to {heads - 1}; got {head}")
        index = torch.arange(length)[None]
        visible = self.visible(index, index, heads).expand(1, heads, length, length)[0, head]
        return Drawing(self.describe(), visible)

    def describe(self) -> str:
        """Return the pattern as one would write it: `streaming(window=512, num_sinks=4)`."""
        return _describe(self.spec)

    def __reduce__(self) -> tuple[Any, ...]:
        return pattern_from_spec, (self.spec,)


ForHeads = Callable[[Sequence[int]], Pattern]
Join = Callable[[Pattern, Pattern], Pattern]
Factory = Callable[..., Pattern]
PATTERNS: Registry[Factory] = Registry("pattern")


def register_pattern(name: str, alike: bool = False) -> Callable[[Factory], Factory]:
    """Decorate a factory to enter it in `PATTERNS`; the patterns it makes remember name and options in `spec`.

    Args:
        alike: Whether all heads see the same in every pattern it makes.
    """

    def decorate(factory: Factory) -> Factory:
        signature = inspect.signature(factory)

        @functools.wraps(factory)
        def make(*args: Any, **options: Any) -> Pattern:
            bound = signature.bind(*args, **options)
            bound.apply_defaults()
            for key, value in bound.arguments.items():
                if isinstance(value, Iterable) and not isinstance(value, str):
                    bound.arguments[key] = tuple(value)
            made = factory(*bound.args, **bound.kwargs)
            values = {key: list(v) if isinstance(v, tuple) else v for key, v in bound.arguments.items()}
            made = replace(made, spec={"name": name, **values})
            return replace(made, for_heads=lambda heads: make(*bound.args, **bound.kwargs)) if alike else made

        return PATTERNS.register(name)(make)

    return decorate


def pattern_from_spec(spec: dict[str, Any]) -> Pattern:
    """Build the pattern that `Pattern.spec` describes."""
    for key, join in (("any", Pattern.__or__), ("all", Pattern.__and__)):
        if key in spec:
            return functools.reduce(join, [pattern_from_spec(part) for part in spec[key]])
    if "name" not in spec:
        raise ValueError(f"a pattern spec has a 'name' (one of {PATTERNS.names()}), 'any' or 'all'; got {spec!r}")
    options = {key: value for key, value in spec.items() if key != "name"}
    return make_pattern(spec["name"], options)


def is_registered(spec: dict[str, Any]) -> bool:
    """Whether `pattern_from_spec` can build what `spec` describes: no part of it was made outside a factory."""
    parts = spec.get("any") or spec.get("all")
    return all(is_registered(part) for part in parts) if parts else spec.get("name") in PATTERNS


def with_seed(spec: dict[str, Any], offset: int) -> dict[str, Any] | None:
    """Return `spec` with `offset` added to every seed in it; None if it has none."""
    for key in ("any", "all"):
        if key in spec:
            changed = [with_seed(part, offset) for part in spec[key]]
            if all(part is None for part in changed):
                return None
            return {key: [old if new is None else new for old, new in zip(spec[key], changed, strict=True)]}
    return {**spec, "seed": spec["seed"] + offset} if "seed" in spec else None


def pattern_options(name: str) -> set[str]:
    """Return the names of the options that the pattern `name` has."""
    return set(inspect.signature(PATTERNS.get(name)).parameters)


def make_pattern(name: str, options: dict[str, Any]) -> Pattern:
    """Call the factory `name`, with an error that names the options it has when these do not fit."""
    factory = PATTERNS.get(name)
    parameters = inspect.signature(factory).parameters
    missing = [p.name for p in parameters.values() if p.default is p.empty and p.name not in options]
    unknown = [key for key in options if key not in parameters]
    if missing or unknown:
        wrong = f"does not take {unknown}" if unknown else f"needs {missing}"
        raise ValueError(f"pattern {name!r} {wrong}; its options: {', '.join(parameters)}")
    return factory(**options)


def _same_heads(first: Pattern, second: Pattern) -> int | None:
    """The number of heads both are made for."""
    numbers = {x.num_heads for x in (first, second) if x.num_heads is not None}
    if len(numbers) > 1:
        raise ValueError(f"patterns for different numbers of query heads cannot be joined: {sorted(numbers)}")
    return numbers.pop() if numbers else None


def _each_for_heads(first: Pattern, second: Pattern, join: Join) -> ForHeads | None:
    """How a joined pattern tells what some heads see, if both of its sides do."""
    one, other = first.for_heads, second.for_heads
    return (lambda heads: join(one(heads), other(heads))) if one and other else None


def _intersection(first: Pattern, second: Pattern) -> Parts:
    """The parts of the pattern that looks back less far, limited to the other."""
    kept = (first.retention, second.retention)
    reach = [math.inf if x.window is None or not x.is_bounded else x.window for x in kept]
    if not second.parts or (first.parts and reach[0] <= reach[1]):
        return tuple(part.limited(second.mask_mod) for part in first.parts)
    return tuple(part.limited(first.mask_mod) for part in second.parts)


def _describe(spec: dict[str, Any]) -> str:
    if not spec:
        return "custom"
    for key, sign in (("any", " | "), ("all", " & ")):
        if key in spec:
            return sign.join(f"({_describe(p)})" if "name" not in p else _describe(p) for p in spec[key])
    options = ", ".join(f"{key}={value}" for key, value in spec.items() if key != "name")
    return f"{spec['name']}({options})"
