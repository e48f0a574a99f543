"""Sparse attention by PyTorch's FlexAttention: one fused kernel, which skips blocks of which a pattern shows nothing.

Which blocks those are, a `BlockMask` says; it is made once for a pattern, its lengths and its device, and kept. Within
a block that is visible in part the kernel asks a predicate about each pair. Kernels count in 32 bits and compute a
predicate only if it is made of operations on single numbers, so a pattern's own predicate is taken where it consists
of sums, remainders and comparisons. Any other is looked up: the kernel reads tables of its tiles, few of which differ.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from ...patterns import Pattern
from ...patterns.base import is_registered
from ...patterns.parts import MaskMod
from ..blocks import learns
from .jobs import Places

BLOCK = 128  # tokens of a block, of queries as of keys: what kernels are tuned for
LEAST_DIM = 16  # head dimensions that kernels take are powers of two from here on
KEPT_MASKS = 64  # more than most models have layers: patterns with seeds differ in each
KEPT_KERNELS = 256
IN_32_BITS = frozenset(
    "add sub rsub remainder floor_divide eq ne lt le gt ge bitwise_and bitwise_or bitwise_xor bitwise_not "
    "logical_and logical_or logical_not".split()
)


class Mask(NamedTuple):
    """What one kernel needs to know of a pattern.

    Args:
        blocks: Which blocks are visible: in part, or as a whole.
        program: Names what the predicate computes; what it reads may differ.
    """

    blocks: BlockMask
    program: Hashable


@torch.compiler.disable
def sparse_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, pattern: Pattern, places: Places, scale: float
) -> torch.Tensor:
    """Compute attention of query `[B, H, T, D]` over key `[B, G, S, D]` and value `[B, G, S, V]`; a query that sees no
    key gets zero.

    The first call of a kind compiles, which takes seconds on a GPU and half a minute on a CPU.

    Raises:
        ValueError: if gradients are needed on a CPU.
    """
    if query.device.type == "cpu":
        if learns((query, key, value)):
            raise ValueError(
                "backend 'flex' has no gradients on a CPU; use 'auto', 'banded', 'gathered' or 'masked', or compute "
                "under torch.no_grad()"
            )
        with torch.no_grad():
            return _attend(query.detach(), key.detach(), value.detach(), pattern, places, scale)
    return _attend(query, key, value, pattern, places, scale)


def _attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, pattern: Pattern, places: Places, scale: float
) -> torch.Tensor:
    tensors = [_widened(x) for x in (query, key, value)]
    tokens, total = query.shape[2], key.shape[2]
    held = None if places.slots is None else _held(places.slots, total)
    mask = block_mask(pattern, _identity(pattern), query.shape[1], tokens, total, places.first, held, str(query.device))
    shapes = tuple((x.shape[1], x.shape[3], x.dtype, x.requires_grad) for x in tensors)
    modes = (torch.is_grad_enabled(), torch.is_inference_mode_enabled())
    kind = (mask.program, str(query.device), shapes, modes, _lengths(query.shape[0], tokens, total, query.is_cuda))
    return compiled(kind, scale, query.is_cuda)(*tensors, mask.blocks)[..., : value.shape[3]]


def _lengths(batch: int, tokens: int, total: int, many: bool) -> Hashable:
    """Return what of the lengths needs a kernel of its own, if one is to serve `many`."""
    if not many:
        return batch, tokens, total
    return batch == 1, *((n <= BLOCK, n % BLOCK == 0) for n in (tokens, total))


@functools.lru_cache(KEPT_KERNELS)
def compiled(kind: Hashable, scale: float, dynamic: bool) -> Callable[..., torch.Tensor]:
    """Return FlexAttention `(query, key, value, blocks) -> output` for one kind of calls.

    The compiler keeps few versions of a function, and counts those of one code object; so every kind has its own, in
    which only lengths are left to differ.

    Args:
        dynamic: Whether, after the first, there is one kernel for all lengths. On a CPU some of those do not build.
    """

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, blocks: BlockMask) -> torch.Tensor:
        # the other kernel, for few queries, does not take all numbers of grouped heads
        options: Any = {"FORCE_USE_FLEX_ATTENTION": True}
        output = flex_attention(
            query, key, value, block_mask=blocks, scale=scale, enable_gqa=True, kernel_options=options
        )
        assert isinstance(output, torch.Tensor)
        return output

    attend.__code__ = attend.__code__.replace(co_name=f"attend_{abs(hash((kind, scale)))}")
    return torch.compile(attend, fullgraph=True, dynamic=None if dynamic else False)


@functools.lru_cache(KEPT_MASKS)
def block_mask(
    pattern: Pattern,
    identity: Hashable,
    num_heads: int,
    tokens: int,
    total: int,
    first: int,
    held: bytes | None,
    device: str,
) -> Mask:
    """Return the mask of queries at positions `first .. first + tokens − 1` over `total` keys.

    Args:
        identity: Tells patterns apart that are equal otherwise.
        held: Position of each key, as the bytes of int64, negative for slots nobody sees; None if key j is at j.
    """
    with torch.inference_mode(False), torch.no_grad():  # the tensors may serve calls that learn
        positions = torch.arange(total) if held is None else torch.frombuffer(bytearray(held), dtype=torch.int64)
        positions = functional.pad(positions.to(device), (0, -total % BLOCK), value=-1)
        mask_mod = _arithmetic(pattern, identity)
        program: Hashable = (pattern, identity)
        counts, slots, tiles = _tiles(pattern, num_heads, first, tokens, positions, mask_mod is None)
        if mask_mod is None:
            mask_mod, program = _looked_up(slots.expand(num_heads, -1, -1), tiles), ("looked up", slots.shape[0] == 1)
        elif first or held is not None:
            mask_mod, program = _placed(mask_mod, torch.tensor(first, device=device), positions), (program, "placed")
        full, partial = counts == BLOCK**2, (counts > 0) & (counts < BLOCK**2)
        blocks = BlockMask.from_kv_blocks(
            *_ordered(partial), *_ordered(full), BLOCK_SIZE=BLOCK, mask_mod=mask_mod, seq_lengths=(tokens, total)
        )
        return Mask(blocks, program)


def _tiles(
    pattern: Pattern, num_heads: int, first: int, tokens: int, positions: torch.Tensor, wants_tiles: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Cut the matrix of queries and keys into blocks, a row of them at a time.

    Args:
        positions: Of the keys, whole blocks of them.

    Returns:
        Visible pairs of each block `[1 or H, rows, columns]`; and, if wanted, which tile each block looks like, of the
        same shape, and all different tiles, booleans `[n, BLOCK, BLOCK]`.
    """
    device, found = positions.device, {bytes(BLOCK**2): 0, b"\1" * BLOCK**2: 1}
    counts, slots = [], []
    for start in range(first, first + tokens, BLOCK):
        queries = torch.arange(start, start + BLOCK, device=device)
        visible = pattern.visible(queries[None], positions[None], num_heads)[0]  # [1 or H, BLOCK, S]
        visible = visible & (queries < first + tokens)[:, None]
        blocks = visible.unflatten(2, (-1, BLOCK)).transpose(1, 2)  # [1 or H, columns, BLOCK, BLOCK]
        count = blocks.sum(dim=(2, 3))
        slot = (count == BLOCK**2).to(torch.int32)
        if wants_tiles:
            partial = (count > 0) & (count < BLOCK**2)
            rows = blocks[partial].flatten(1).cpu().numpy()
            numbers = [found.setdefault(row.tobytes(), len(found)) for row in rows]
            slot[partial] = torch.tensor(numbers, dtype=torch.int32, device=device)
        counts.append(count)
        slots.append(slot)
    tiles = torch.frombuffer(bytearray(b"".join(found)), dtype=torch.bool).view(-1, BLOCK, BLOCK)
    return torch.stack(counts, dim=1), torch.stack(slots, dim=1), tiles.to(device)


def _ordered(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return, for booleans `[H, rows, columns]`, their number in each row and their columns, with a batch of one."""
    columns = blocks.to(torch.int32).argsort(dim=2, descending=True, stable=True)
    return blocks.sum(dim=2, dtype=torch.int32)[None], columns.to(torch.int32)[None]


def _placed(mask_mod: MaskMod, first: torch.Tensor, positions: torch.Tensor) -> MaskMod:
    """Return the predicate for queries from position `first` on, and keys at `positions`: tensors, so that one kernel
    serves all of them."""

    def placed(b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return mask_mod(b, h, q + first, positions[k]) & (positions[k] >= 0)

    return placed


def _looked_up(slots: torch.Tensor, tiles: torch.Tensor) -> MaskMod:
    """Return the predicate that reads tables; see `_tiles`."""

    def looked_up(b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return tiles[slots[h, q // BLOCK, k // BLOCK], q % BLOCK, k % BLOCK]

    return looked_up


@functools.lru_cache(KEPT_MASKS)
def _arithmetic(pattern: Pattern, identity: Hashable) -> MaskMod | None:
    """Return the predicate of `pattern`, the same one for equal patterns, if a kernel can compute it; else None."""
    index = [torch.zeros((), dtype=torch.int32) for _ in range(4)]
    try:
        graph = make_fx(pattern.mask_mod)(*index).graph
    except RuntimeError:  # it asks tensors for their values
        return None
    steps = [node for node in graph.nodes if node.op not in ("placeholder", "output")]
    names = [str(step.target).removeprefix("aten.") for step in steps]
    known = all(name == "div.Tensor_mode" or name.partition(".")[0] in IN_32_BITS for name in names)
    is_small = all(abs(x) < 2**31 for step in steps for x in step.args if isinstance(x, int))
    return pattern.mask_mod if known and is_small else None


def _identity(pattern: Pattern) -> Hashable:
    """Return what tells `pattern` apart from equal ones: nothing, unless it was made by hand."""
    return None if is_registered(pattern.spec) else pattern.mask_mod


def _held(slots: torch.Tensor, total: int) -> bytes:
    """Return the position of each of `total` keys, given the index of the key at each position."""
    positions = slots.new_full((total,), -1)
    known = slots >= 0
    positions[slots[known]] = known.nonzero()[:, 0]
    return positions.cpu().numpy().tobytes()


def _widened(x: torch.Tensor) -> torch.Tensor:
    """Return `[B, H, T, D]` with zeros behind up to a head dimension that kernels take."""
    width = max(LEAST_DIM, 1 << (x.shape[3] - 1).bit_length())
    return functional.pad(x, (0, width - x.shape[3])) if width > x.shape[3] else x
