"""Hybrid attention: a softmax window and sinks, and the linear state of everything older, under one normaliser."""

from __future__ import annotations

import torch

from ...notation import check_heads
from ..linear import LinearOutput, LinearState
from ..stream import Stream
from . import chunked, reference
from .options import HybridOptions
from .recurrent import step

BACKENDS = {"reference": reference.hybrid_attention, "chunked": chunked.hybrid_attention}

__all__ = ["BACKENDS", "HybridOptions", "hybrid_attention", "step"]


def hybrid_attention(
    query: torch.Tensor,
    stream: Stream,
    state: LinearState,
    options: HybridOptions,
    *,
    lengths: torch.Tensor | None = None,
    backend: str = "auto",
) -> LinearOutput:
    """Compute `o = (e^{ℓ_sm} o_sm + e^{ℓ_lin} o_lin) / (e^{ℓ_sm} + e^{ℓ_lin})`.

    `ℓ_sm` and `o_sm` are the log-sum-exp and the output of softmax attention over the last `window` keys and the
    first `num_sinks`; `ℓ_lin = log(φ(q)·z) + b` and `o_lin` those of linear attention over all other keys (after
    LoLCATs, arXiv 2410.10254, whose own weighing is another `join`). While the text is shorter than the window
    this is softmax attention.

    Args:
        query: `[B, H, T, D]`, in the order of positions, real tokens first in each row.
        stream: Keys and values of the last `window` positions before the first query (or of none, where there is no
            past), then of the T queries.
        state: The linear state of all keys older than the stream, sinks excepted.
        options: Feature maps, bias, window, sinks, scale.
        lengths: Real queries of each row `[B]`; None for T in every row. Those behind have meaningless outputs and
            leave the state as it was.
        backend: "reference", "chunked" or "auto".

    Returns:
        LinearOutput: output `[B, H, T, V]` in the dtype of the query, and the linear state, into which the keys went
        that left the window of the last real query.

    Raises:
        ValueError: if shapes do not fit together, or for an unknown backend.
    """
    recurrence = options.recurrence
    check_heads(query, stream.key if recurrence is None else recurrence.without_gates(stream.key), stream.value, "D")
    past = stream.key.shape[2] - query.shape[2]
    if past not in (0, options.window):
        raise ValueError(
            f"the stream must begin 0 or window = {options.window} keys before the first query; got {past}"
        )
    if recurrence is not None:
        options = options._replace(chunk_size=recurrence.chunk_size(options.chunk_size))
    backend = "chunked" if backend == "auto" else backend
    if backend not in BACKENDS:
        raise ValueError(f"unknown backend {backend!r}; valid: auto, {', '.join(BACKENDS)}")
    return BACKENDS[backend](query, stream, state, options, lengths)
