"""Softmax attention over a cache of limited capacity, which gives up what an eviction finds least important."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.nn import functional

from ..cache.slots import GROWTH
from ..config import SparseConfig
from ..evictions import EVICTIONS, Evidence
from ..notation import may_overwrite
from ..ops.sparse import masked, weighed
from .base import MECHANISMS, Mechanism
from .call import Call
from .geometry import HeadGeometry


class EvictingState(NamedTuple):
    """What is kept, for each key/value head its own, in the order of positions.

    Args:
        keys, values: `[B, G, S, D]`, `[B, G, S, V]`, in the dtype they came in.
        positions: Position held by each slot `[B, G, S]`, −1 for an empty one.
        mass: Weights each key has got `[B, G, S]`, float32; of no slots where the eviction does not ask.
        queries: The last queries `[B, H, Q, D]`; none where the eviction does not ask.
        num_tokens: Tokens each row has seen `[B]`; held: slots each row has filled `[B]`.
        least, most: Bounds of `held` over the rows, known without asking the device.
    """

    keys: torch.Tensor
    values: torch.Tensor
    positions: torch.Tensor
    mass: torch.Tensor
    queries: torch.Tensor
    num_tokens: torch.Tensor
    held: torch.Tensor
    least: int
    most: int


@MECHANISMS.register("evicting")
class EvictingAttention(Mechanism):
    """Softmax attention that keeps `capacity` tokens of each row and head (see `hf_effattn.evictions`).

    The first call, the prompt, is attended to in full and reduced to the capacity at its end. Tokens after it come on
    top, until `interval` of them are there; then the cache is reduced to the capacity again. Without a cache nothing is
    given up: that is dense attention.

    Args:
        config: Eviction and capacity.
        geometry: Heads and head dimension of the layer.
    """

    options: SparseConfig

    def __init__(self, config: SparseConfig, geometry: HeadGeometry) -> None:
        super().__init__(config, geometry)
        assert config.eviction is not None
        self.eviction = EVICTIONS.get(config.eviction)()
        self.capacity = config.kept()
        self.interval = max(1, min(64, self.capacity // 8))
        self.needs_queries = self.eviction.accumulates or self.eviction.num_queries > 0

    def attend(
        self, state: EvictingState | None, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, call: Call
    ) -> tuple[torch.Tensor, EvictingState]:
        if state is None or not state.most:
            return self._attend_prompt(query, key, value, call)
        state = self._matching(state, key)
        outputs, start, tokens = [], 0, query.shape[2]
        while start < tokens:
            state = self._with_room(state, call)
            end = min(tokens, start + self.capacity + self.interval - state.most)
            q, k, v = (x[:, :, start:end] for x in (query, key, value))
            lengths = None if call.lengths is None else (call.lengths - start).clamp(0, end - start)
            output, state = self._attend_more(state, q, k, v, call._replace(lengths=lengths))
            outputs.append(output)
            start = end
        return torch.cat(outputs, dim=2) if len(outputs) > 1 else outputs[0], state

    def num_visible(self, context_length: int) -> int:
        return min(context_length, self.capacity + self.interval)

    def cache_bytes(self, context_length: int, dtype: torch.dtype) -> int:
        g, slots = self.geometry, self._num_slots(context_length)
        marks = torch.int64.itemsize + (torch.float32.itemsize if self.eviction.accumulates else 0)
        queries = g.num_heads * self.eviction.num_queries * g.head_dim * dtype.itemsize
        per_slot = g.num_kv_heads * ((g.head_dim + g.value_dim) * dtype.itemsize + marks)
        return slots * per_slot + queries + 2 * torch.int64.itemsize

    def flops_per_token(self, context_length: int) -> int:
        return self.geometry.softmax_flops(self.num_visible(context_length))

    def backend(self, device: str = "cpu") -> str:
        return "masked"

    def describe(self) -> str:
        return f"sparse {self.options.eviction}(capacity={self.capacity})"

    def _num_slots(self, held: int) -> int:
        full = self.capacity + self.interval
        return full if held > self.capacity else min(-(-held // GROWTH) * GROWTH, full)

    def _attend_prompt(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, call: Call
    ) -> tuple[torch.Tensor, EvictingState]:
        batch, groups, tokens, _ = key.shape
        index = torch.arange(tokens, device=key.device)
        lengths = index.new_full((batch,), tokens) if call.lengths is None else call.lengths
        mass = key.new_zeros(batch, groups, 0, dtype=torch.float32)
        if self.eviction.accumulates and call.keep_state:
            seen = (index[:, None] >= index) & (index[:, None] < lengths[:, None, None])
            output, mass = weighed.attend(query, key, value, seen[:, None], call.scale)
        else:
            output = masked.attend_causal(query, key, value, call.scale, call.dropout)
        number = self.eviction.num_queries
        last = lengths[:, None] - number + torch.arange(number, device=key.device)  # [B, Q]
        queries = query.gather(2, last.clamp(min=0)[:, None, :, None].expand(-1, query.shape[1], -1, query.shape[3]))
        positions = torch.where(index < lengths[:, None], index, -1)[:, None].expand(-1, groups, -1)
        state = EvictingState(key, value, positions, mass, queries, lengths, lengths, tokens, tokens)
        if not call.keep_state:
            return output, state
        if call.lengths is not None:
            state = state._replace(least=int(lengths.min()), most=int(lengths.max()))
        if state.most <= self.capacity:  # tensors of the state's own, which may be overwritten
            state = state._replace(keys=key.clone(), values=value.clone(), positions=positions.contiguous())
        return output, self._resized(self._reduced(state, call.scale), self._num_slots(tokens))

    def _attend_more(
        self, state: EvictingState, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, call: Call
    ) -> tuple[torch.Tensor, EvictingState]:
        """Attend with tokens for which every row has room."""
        batch, tokens = query.shape[0], query.shape[2]
        index = torch.arange(tokens, device=key.device)
        added = index.new_full((batch,), tokens) if call.lengths is None else call.lengths
        state = self._resized(state, self._num_slots(state.most + tokens))
        at = state.num_tokens[:, None] + index  # [B, T]
        slots = state.held[:, None] + index
        real = index < added[:, None]
        safe = call.in_place and may_overwrite(state.keys)
        keys, values, positions = (
            _placed(old if safe else old.clone(), slots, real, new)
            for old, new in (
                (state.keys, key),
                (state.values, value),
                (state.positions[..., None], at[:, None, :, None].expand(-1, key.shape[1], -1, -1)),
            )
        )
        positions = positions[..., 0]
        seen = (positions >= 0)[:, :, None] & (positions[:, :, None] <= at[:, None, :, None])  # [B, G, T, S]
        mass = state.mass
        if self.eviction.accumulates:
            output, new_mass = weighed.attend(query, keys, values, seen & real[:, None, :, None], call.scale)
            mass = mass + new_mass
        else:
            rows = query.unflatten(1, (key.shape[1], -1)).flatten(2, 3)  # [B, G, R·T, D]
            repeated = seen.repeat(1, 1, rows.shape[2] // tokens, 1)
            output = masked.attend(rows, keys, values, repeated, call.scale, call.dropout).reshape(*query.shape[:3], -1)
        queries = state.queries
        if self.eviction.num_queries:
            place = (added[:, None] + torch.arange(self.eviction.num_queries, device=key.device))[:, None, :, None]
            both = torch.cat((queries, query), dim=2)
            queries = both.gather(2, place.expand(-1, both.shape[1], -1, both.shape[3]))
        least = state.least + tokens if call.lengths is None else int((state.held + added).min())
        most = state.most + tokens if call.lengths is None else int((state.held + added).max())
        held, seen_tokens = state.held + added, state.num_tokens + added
        return output, EvictingState(keys, values, positions, mass, queries, seen_tokens, held, least, most)

    def _with_room(self, state: EvictingState, call: Call) -> EvictingState:
        """Return `state` with room for at least one more token in every row: full rows are reduced to the capacity."""
        full = self.capacity + self.interval
        if state.most < full:
            return state
        if state.least == state.most:
            return self._resized(self._reduced(state, call.scale), full)
        held = [min(number, self.capacity) if number >= full else number for number in state.held.tolist()]
        reduced = self._resized(self._reduced(state, call.scale), full)
        rows = state.held >= full
        wide = self._resized(state, full)
        chosen = {
            name: torch.where(rows.view(-1, *(1,) * (old.ndim - 1)), getattr(reduced, name), old)
            for name, old in wide._asdict().items()
            if isinstance(old, torch.Tensor)
        }
        return wide._replace(**chosen, least=min(held), most=max(held))

    def _reduced(self, state: EvictingState, scale: float) -> EvictingState:
        """Return `state` with the most important `capacity` keys of each row and head, or all if there are no more."""
        capacity = self.capacity
        if state.most <= capacity:
            return state
        by_head = state.queries.unflatten(1, (state.keys.shape[1], -1))  # [B, G, R, Q, D]
        evidence = Evidence(state.keys, state.values, state.positions, state.mass, by_head, state.num_tokens, scale)
        index = self.eviction.kept(evidence, capacity)
        place = state.positions.gather(2, index)
        order = place.masked_fill(place < 0, torch.iinfo(place.dtype).max).argsort(dim=2)
        index = index.gather(2, order)
        wide = index[..., None]
        return state._replace(
            keys=state.keys.gather(2, wide.expand(-1, -1, -1, state.keys.shape[3])),
            values=state.values.gather(2, wide.expand(-1, -1, -1, state.values.shape[3])),
            positions=state.positions.gather(2, index),
            mass=state.mass.gather(2, index) if state.mass.shape[2] else state.mass,
            held=state.held.clamp(max=capacity),
            least=min(state.least, capacity),
            most=capacity,
        )

    def _resized(self, state: EvictingState, slots: int) -> EvictingState:
        """Return `state` in `slots` slots of its own; what is cut away is empty."""
        missing = slots - state.keys.shape[2]
        if not missing:
            return state
        mass = functional.pad(state.mass, (0, missing)) if state.mass.shape[2] else state.mass
        return state._replace(
            keys=functional.pad(state.keys, (0, 0, 0, missing)),
            values=functional.pad(state.values, (0, 0, 0, missing)),
            positions=functional.pad(state.positions, (0, missing), value=-1),
            mass=mass,
        )

    def _matching(self, state: EvictingState, key: torch.Tensor) -> EvictingState:
        """Return `state` in the dtype of `key`, which autocast may have changed since."""
        if state.keys.dtype == key.dtype:
            return state
        tensors = {name: getattr(state, name).to(key.dtype) for name in ("keys", "values", "queries")}
        return state._replace(**tensors)


def _placed(old: torch.Tensor, slots: torch.Tensor, real: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """Write `new` `[B, G, T, X]` into the slots `[B, T]` of `old` `[B, G, S, X]` where it is real `[B, T]`."""
    index = slots[:, None, :, None].expand_as(new)
    kept = old.gather(2, index)
    return old.scatter_(2, index, torch.where(real[:, None, :, None], new, kept))
