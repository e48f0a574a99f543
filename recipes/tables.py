"""Tables of benchmark results."""

from __future__ import annotations

from typing import Any

from layers import CONFIGS, HEADS


def markdown(result: dict[str, Any]) -> str:
    """Return the ratios to dense attention, and the scratch memory, as Markdown tables."""
    lines = [
        f"One attention layer: {HEADS.num_heads} query heads, {HEADS.num_kv_heads} key/value heads, head dimension "
        f"{HEADS.head_dim}, one row, {result['dtype']}; {result['threads']} thread(s), least time of "
        f"{result['rounds']} interleaved rounds, feature maps included; {result['machine']} CPU, torch "
        f"{result['versions']['torch']}."
    ]
    tables: dict[str, dict[Any, dict[str, str]]] = {}
    for suite, dense in (("prefill", "dense SDPA"), ("decode", "dense DynamicCache")):
        times = result["seconds"].get(suite, {})
        tables[f"{suite}: dense / time"] = {
            n: {x: f"{t[dense] / t[x]:.2f}x" for x in CONFIGS} for n, t in times.items()
        }
    tables["MB beyond inputs and output"] = {
        n: {x: f"{bytes_ / 2**20:.0f}" for x, bytes_ in found.items()} for n, found in result["scratch"].items()
    }
    for title, columns in tables.items():
        if columns:
            sizes = " | ".join(f"{int(n):,}" for n in columns)
            lines += ["", f"| {title} | {sizes} |", "|---" * (1 + len(columns)) + "|"]
            lines += [f"| {name} | {' | '.join(cell[name] for cell in columns.values())} |" for name in CONFIGS]
    return "\n".join(lines) + "\n"
