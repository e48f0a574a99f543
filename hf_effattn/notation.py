"""The letters that shapes are written in, the same in docstrings, comments and einsum strings.

| letter | dimension                                            |
|--------|------------------------------------------------------|
| B      | rows of the batch                                    |
| H      | query heads                                          |
| G      | key/value heads; H is a multiple of G                |
| R      | query heads that share one key/value head, R = H / G |
| T      | queries (the tokens of this call)                    |
| S      | keys, or slots of a key/value store                  |
| D      | head dimension of queries and keys                   |
| F      | feature dimension of a feature map                   |
| V      | head dimension of values                             |
| C      | tokens of one chunk                                  |
| N      | chunks                                               |

Layout is `[B, H, T, D]` everywhere. A *position* counts the real (not padded) tokens of a row from 0. Padding masks are
boolean with True = keep. States are float32 whatever the dtype of the model (float64 for a float64 model).
"""

from __future__ import annotations

from typing import Any

import torch


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of recurrent states for activations of `dtype`: float32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of matrix products over features: bfloat16 stays, float16 has too small a range."""
    return torch.float32 if dtype == torch.float16 else dtype


def check_heads(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, last: str) -> None:
    """Raise a ValueError unless query `[B,H,T,x]`, key `[B,G,S,x]` and value `[B,G,S,V]` fit together.

    Args:
        last: The letter of the last dimension of query and key, for the message ("D" or "F").
    """
    shapes = f"query {list(query.shape)}, key {list(key.shape)}, value {list(value.shape)}"
    expected = f"expected query [B,H,T,{last}], key [B,G,S,{last}], value [B,G,S,V]; got {shapes}"
    if not query.ndim == key.ndim == value.ndim == 4:
        raise ValueError(expected)
    if query.shape[0] != key.shape[0] or query.shape[3] != key.shape[3] or key.shape[:3] != value.shape[:3]:
        raise ValueError(expected)
    if key.shape[1] == 0 or query.shape[1] % key.shape[1]:
        raise ValueError(f"the number of query heads must be a multiple of that of key/value heads; got {shapes}")
    if not query.dtype == key.dtype == value.dtype:
        raise TypeError(f"query, key and value differ in dtype: {query.dtype}, {key.dtype}, {value.dtype}")


def check_padding(padding_mask: torch.Tensor | None, batch: int, length: int) -> None:
    """Raise unless `padding_mask` is None or boolean `[batch, length]` with True = keep."""
    if padding_mask is None:
        return
    if padding_mask.dtype != torch.bool:
        raise TypeError(f"padding_mask must be boolean (True = keep); got {padding_mask.dtype}")
    if padding_mask.shape != (batch, length):
        raise ValueError(f"padding_mask must be [{batch}, {length}]; got {list(padding_mask.shape)}")


def whole_number(name: str, value: Any, least: int) -> int:
    """Return `value` if it is an integer of at least `least`, else raise an error that says so."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer of at least {least}; got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}; got {value}")
    return value


def coarse(x: torch.Tensor) -> torch.Tensor:
    """Return float32 `x` rounded to 11 bits: what is equal but for rounding is then decided upon alike in any batch."""
    return (x.contiguous().view(torch.int32) + (1 << 11) & -(1 << 12)).view(torch.float32)


def may_overwrite(x: torch.Tensor) -> bool:
    """Whether operations in place are allowed on `x` here: not outside inference mode if it was made inside, and not if
    a pass back may still need it."""
    if x.requires_grad:
        return False
    return torch.compiler.is_compiling() or not x.is_inference() or torch.is_inference_mode_enabled()


def by_row(x: torch.Tensor, kv_heads: int, rows: int) -> torch.Tensor:
    """Return what each query head has, `[H]`, for the rows that queries are folded into, `[1, G, rows, 1]`."""
    heads = x.view(kv_heads, -1)
    return heads.repeat_interleave(rows // heads.shape[1], dim=1)[None, :, :, None]


def rotary_half(x: torch.Tensor, head_dim: int, before: bool) -> torch.Tensor:
    """Return queries or keys after rotary, or before it, `[..., D]`.

    Args:
        x: `[..., D]`, of which there is one kind only, or `[..., 2D]`: those after rotary, then those before it.
        head_dim: D.
        before: Which are wanted.
    """
    if x.shape[-1] == head_dim:
        return x
    return x[..., head_dim:] if before else x[..., :head_dim]
