"""From transformers' attention masks to segments: what padding and packing mean to a converted layer.

Segments say of each new token whether it is padding (booleans), or of which packed document it is (integers, 0 for
padding). They are linear in the text, where transformers' own masks are quadratic.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers.masking_utils import causal_mask_function

_is_exporting = getattr(torch.compiler, "is_exporting", lambda: False)  # PyTorch has it from 2.7 on


def effattn_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | torch.Tensor = 0,
    kv_offset: int | torch.Tensor = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    device: torch.device | str | None = None,
    **_: Any,
) -> torch.Tensor | None:
    """Return the segments of the new tokens `[B, 1, 1, T]`, or None if all are real and of one document.

    This is what transformers calls in place of building a mask once every layer of a model is converted. It has four
    dimensions so that transformers takes it for a finished mask where it comes by again.

    Args:
        attention_mask: Booleans `[B, tokens seen + T]`, True = keep.
        mask_function: transformers' causal rule; one that knows documents if `position_ids` restart within rows.
    """
    if attention_mask is not None:
        if not torch.compiler.is_compiling() and not int(kv_offset):  # our own caches begin after the past
            refuse_padded_past(attention_mask[:, : int(q_offset)].bool())
        return _new_columns(attention_mask.bool(), q_offset, q_length)
    if mask_function is causal_mask_function or q_length == 1:
        return None
    row = torch.arange(batch_size, device=device)[:, None]
    token = torch.arange(1, q_length, device=device)[None]
    continues = mask_function(row, torch.zeros_like(row), token, token - 1).expand(batch_size, -1)
    if _is_exporting():  # an exported graph cannot depend on where documents begin
        torch._assert_async(
            continues.all(), "an exported model takes one document a row, position_ids without restarts"
        )
        return None
    starts = torch.cat((continues.new_ones(batch_size, 1), ~continues), dim=1)
    segment_ids = starts.long().cumsum(dim=1)
    return None if bool((segment_ids[:, -1] == 1).all()) else segment_ids[:, None, None]


def refuse_padded_past(real: torch.Tensor) -> None:
    """Raise if not all tokens `[B, S]` that softmax layers left in a cache are real: keys alone do not tell."""
    if not bool(real.all()):
        raise ValueError(
            f"the cache holds {real.shape[1]} tokens of softmax attention with padding among them, which a converted "
            "layer cannot tell apart; start with a new cache"
        )


def _new_columns(mask: torch.Tensor, seen: int | torch.Tensor, tokens: int) -> torch.Tensor | None:
    """Columns seen … seen + tokens of `mask` as `[B, 1, 1, tokens]`; None if they are known to be all True."""
    if torch.compiler.is_compiling():
        columns = torch.arange(tokens, device=mask.device) + seen
        return mask.index_select(1, columns)[:, None, None]
    start = int(seen)
    end = start + tokens
    if mask.shape[1] < end:
        raise ValueError(
            f"attention_mask covers {mask.shape[1]} tokens, but {start} are in the cache and {tokens} are new: it "
            f"must cover all {end}"
        )
    new = mask[:, start:end]
    return None if bool(new.all()) else new[:, None, None]


def read_mask(
    mask: Any, num_tokens: int, num_seen: int | torch.Tensor, window: int | None = None
) -> torch.Tensor | None:
    """Read the mask a converted layer receives as segments.

    Args:
        mask: None; segments `[B, 1, 1, T]` or 2-D padding `[B, ≥ T]`; or transformers' own 4-D mask `[B, 1, T, S]`,
            boolean or additive, which models with some softmax layers build for these.
        num_tokens: T, the new tokens.
        num_seen: Tokens in the cache.
        window: Window of the layer before it was converted, to which a 4-D mask may be cut; the mechanism replaces it.

    Returns:
        `[B, T]`: booleans, True = keep; or integers, 0 for padding and k for the k-th document packed into a row. None
        if it is known that all tokens are real and of one document.

    Raises:
        ValueError: for masks that are more than causality, padding and packing.
    """
    if mask is None:
        return None
    if not isinstance(mask, torch.Tensor):
        raise ValueError(
            f"converted layers cannot read a {type(mask).__name__}; use attn_implementation 'sdpa' or 'eager' for the "
            "layers that stay softmax"
        )
    if mask.ndim == 2:
        segments = mask[:, -num_tokens:].bool()
    elif mask.ndim != 4:
        raise ValueError(f"attention_mask must be [B, T] (1 = keep), or None; got shape {list(mask.shape)}")
    elif mask.shape[1] != 1:
        raise ValueError(
            f"attention_mask of shape {list(mask.shape)} differs by head; converted layers take padding masks [B, T]"
        )
    elif num_tokens == 1:
        segments = _of_one_token(mask, num_seen)
    elif mask.shape[1:3] == (1, 1) and mask.shape[3] == num_tokens and not mask.is_floating_point():
        segments = mask[:, 0, 0]
    else:
        segments = _from_full_mask(mask, num_tokens, int(num_seen), window)
    if torch.compiler.is_compiling():
        return segments
    if segments.dtype != torch.bool and int(segments.max()) <= 1:
        segments = segments > 0
    return None if segments.dtype == torch.bool and bool(segments.all()) else segments


def _of_one_token(mask: torch.Tensor, num_seen: int | torch.Tensor) -> torch.Tensor:
    """Whether the one new token of each row is real, `[B, 1]`: it is where it sees itself.

    Its column is the last, but in a static cache, which has columns for tokens to come.
    """
    column = torch.as_tensor(num_seen, device=mask.device).clamp(max=mask.shape[3] - 1).view(1)
    own = mask.index_select(3, column)[:, 0, 0]
    return own if own.dtype == torch.bool else own == 0


def _from_full_mask(mask: torch.Tensor, num_tokens: int, num_seen: int, window: int | None) -> torch.Tensor:
    visible = mask
    if mask.dtype != torch.bool:
        lowest = torch.finfo(mask.dtype).min
        if not bool(((mask == 0) | (mask <= lowest)).all()):
            raise ValueError("attention_mask has values other than 0 and minus infinity: biases are not supported")
        visible = mask == 0
    visible = visible[:, 0]  # [B, T, S]
    # Where no layer is softmax, our caches make transformers leave out the past; windows leave out most of it; static
    # caches add columns at the end.
    num_past = min(num_seen, max(visible.shape[2] - num_tokens, 0))
    new = visible[:, :, num_past : num_past + num_tokens]
    if new.shape[1:] != (num_tokens, num_tokens):
        raise ValueError(
            f"attention_mask of shape {list(mask.shape)} fits neither the {num_tokens} new tokens nor these and the "
            f"{num_seen} in the cache"
        )
    real = new.diagonal(dim1=1, dim2=2)  # [B, T]
    index = torch.arange(num_tokens, device=mask.device)
    if num_seen or window == 1:  # the one document that a cache holds goes on
        segment_ids = real.long()
    else:
        latest = torch.where(real, index, -1).cummax(dim=1).values  # last real token up to and including each
        before = torch.cat((latest.new_full((latest.shape[0], 1), -1), latest[:, :-1]), dim=1)
        sees_before = new.gather(2, before.clamp(min=0)[..., None])[..., 0] & (before >= 0)
        segment_ids = (real & ~sees_before).long().cumsum(dim=1) * real
    same = segment_ids[:, :, None] == segment_ids[:, None, :]
    expected = same & real[:, None, :] & (index[:, None] >= index)
    past = visible[:, :, :num_past]
    if not any(_agrees(new, past, real, expected, cut) for cut in {None, window}):
        raise ValueError(
            "custom 4-D attention masks are not supported by converted layers: only causality, padding and packed "
            "documents are"
        )
    return segment_ids


def _agrees(
    new: torch.Tensor, past: torch.Tensor, real: torch.Tensor, expected: torch.Tensor, window: int | None
) -> bool:
    """Whether all real queries see what is expected of the new tokens `[B, T, T]` and all real tokens of the past
    `[B, T, S']`, both cut to a window."""
    tokens, num_past = past.shape[1:]
    if window is not None:
        query = torch.arange(tokens, device=new.device)[:, None] + num_past
        inside = query - torch.arange(num_past + tokens, device=new.device) < window
    else:
        inside = new.new_ones(tokens, num_past + tokens)
    known = (past & real[:, :, None]).any(dim=1, keepdim=True)
    agree = (new == (expected & inside[:, num_past:])).all(dim=2) & (past == (known & inside[:, :num_past])).all(dim=2)
    return bool((agree | ~real).all())
