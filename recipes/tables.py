"""Tables of benchmark results."""

from __future__ import annotations

from typing import Any

# What every time of a suite is compared with, and what is no attention layer.
BASELINES = {
    "prefill": "dense SDPA",
    "crossover": "dense SDPA",
    "decode": "dense DynamicCache",
    "draft": "dense DynamicCache",
    "train": "dense SDPA",
    "model": "dense",
}
YARDSTICKS = ("gemm1k", "add_ dispatch")


def markdown(result: dict[str, Any]) -> str:
    """Return ratios to dense attention, and memory, as Markdown tables."""
    heads = result["heads"]
    lines = [
        f"One attention layer: {heads['num_heads']} query heads, {heads['num_kv_heads']} key/value heads, head "
        f"dimension {heads['head_dim']}, one row, {result['dtype']}; {result['threads']} thread(s), least time of "
        f"{result['rounds']} interleaved rounds, feature maps included; {result['device']}, torch "
        f"{result['versions']['torch']}. The suite `model` is SmolLM2-135M as a whole."
    ]
    for suite, times in result["seconds"].items():
        dense = BASELINES[suite]
        cells = {n: {x: f"{row[dense] / t:.2f}x" for x, t in row.items()} for n, row in times.items()}
        lines += _table(f"{suite}: time of {dense} / time", cells, (*YARDSTICKS, dense))
        if suite == "decode":
            first, last = min(times), max(times)
            flat = {x: f"{times[last][x] / times[first][x]:.2f}" for x in times[last]}
            lines += _table(f"decode: time at {last:,} / time at {first:,}", {"": flat}, (*YARDSTICKS, dense))
    if result.get("gemm share"):
        share = "; ".join(f"{n:,} tokens {part:.0%}" for n, part in result["gemm share"].items())
        lines += ["", f"Linear attention with features given reaches this share of the yardstick's rate: {share}."]
    for what, found in result["megabytes"].items():
        cells = {n: {x: f"{value:.0f}" for x, value in row.items()} for n, row in found.items()}
        lines += _table(f"{what}: MB beyond inputs{' and output' if what == 'prefill' else ''}", cells, ())
    return "\n".join(lines) + "\n"


def _table(title: str, columns: dict[Any, dict[str, str]], left_out: tuple[str, ...]) -> list[str]:
    names = list(dict.fromkeys(name for column in columns.values() for name in column if name not in left_out))
    sizes = " | ".join(f"{n:,}" if isinstance(n, int) else n for n in columns)
    lines = ["", f"| {title} | {sizes} |", "|---" * (1 + len(columns)) + "|"]
    return lines + [f"| {name} | {' | '.join(column.get(name, '') for column in columns.values())} |" for name in names]
