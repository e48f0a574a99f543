"""Dense, sparse and linear attention on one long document: python recipes/demo.py [--model HUB_ID_OR_FOLDER]

Reads a document through each variant of one model and shows perplexity, cache bytes, speed and a continued sentence; a
table, the numbers as JSON and a plot of cache and decoding time against context length go to --out.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from pathlib import Path
from typing import Any

import torch
from models import EMBEDDED, load
from plots import curves
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch.nn.functional import cross_entropy
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

import hf_effattn  # noqa: F401  (gives models convert_attention)
from hf_effattn.cache import with_cache

VARIANTS: dict[str, dict[str, Any] | None] = {
    "dense": None,
    "sparse 512+4": {"mechanism": "sparse", "window": 512, "num_sinks": 4},
    "linear": {"mechanism": "linear"},
}
CONTEXTS = (512, 1024, 2048, 4096, 8192)
PREFILL_CHUNK = 2048
CONTINUED = 24


def document(path: Path | None) -> str:
    """Return the text of `path`, or CPython's own language reference: 700 KB of prose that every Python has."""
    if path is not None:
        return path.read_text(encoding="utf-8")
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def num_scored(length: int) -> int:
    """Return how many of the last of `length` tokens the perplexity is taken of."""
    return min(1024, length // 4)


def cache_bytes(cache: DynamicCache) -> int:
    """Return the bytes that the cache holds, measured on its tensors."""
    layers: list[Any] = list(cache.layers)
    return sum(x.nbytes() if x.keys is None else x.keys.nbytes + x.values.nbytes for x in layers)


def decode(model: PreTrainedModel, cache: DynamicCache, token: torch.Tensor, steps: int) -> tuple[list[int], float]:
    """Continue greedily from a copy of `cache`; return the tokens and the least seconds of a step."""
    cache, tokens, best = copy.deepcopy(cache), [], float("inf")
    for _ in range(steps):
        start = time.perf_counter()
        token = model(token, **with_cache(model, cache)).logits[:, -1:].argmax(-1)
        best = min(best, time.perf_counter() - start)
        tokens.append(int(token))
    return tokens, best


@torch.inference_mode()
def measure(
    model: PreTrainedModel, ids: torch.Tensor, contexts: list[int], length: int, advance: Any
) -> dict[str, Any]:
    """Read `ids` `[1, T]` through the cache up to the last context, measuring at each."""
    scored = num_scored(length)
    cache = DynamicCache(config=model.config)
    found: dict[str, Any] = {"contexts": contexts, "cache_bytes": [], "decode_seconds": []}
    seconds, done = 0.0, 0
    for context in contexts:
        while done < context:
            end = min(done + PREFILL_CHUNK, context)
            if end < length < end + scored:  # the last chunk before `length` must hold all that is scored
                end = length - scored
            keep = scored if end == length else 1
            start = time.perf_counter()
            logits = model(ids[:, done:end], **with_cache(model, cache), logits_to_keep=keep).logits
            seconds += time.perf_counter() - start
            advance(end - done)
            done = end
        last = logits[:, -1:].argmax(-1)
        tokens, step = decode(model, cache, last, CONTINUED if context == length else 6)
        found["cache_bytes"].append(cache_bytes(cache))
        found["decode_seconds"].append(step)
        if context == length:
            targets = ids[0, length - scored + 1 : length + 1]
            found["perplexity"] = float(cross_entropy(logits[0].float(), targets).exp())
            found["continuation"] = [int(last), *tokens]
            found["prefill_tokens_per_second"] = length / seconds
            found["decode_tokens_per_second"] = 1 / step
            found["cache_bytes_at_length"] = found["cache_bytes"][-1]
    return found


def table(results: dict[str, dict[str, Any]], length: int) -> Table:
    dense, held = results["dense"], "cache_bytes_at_length"
    shown = Table(title=f"{length:,} tokens, perplexity of the last {num_scored(length):,}")
    for column in ("attention", "perplexity", "cache", "prefill t/s", "decode t/s"):
        shown.add_column(column, justify="left" if column == "attention" else "right", no_wrap=True)
    for name, r in results.items():
        shown.add_row(
            name,
            f"{r['perplexity']:.2f} ({r['perplexity'] / dense['perplexity']:.2f}x)",
            f"{r[held] / 1e6:.1f} MB ({r[held] / dense[held]:.0%})",
            *(
                f"{r[key]:,.0f} ({r[key] / dense[key]:.1f}x)"
                for key in ("prefill_tokens_per_second", "decode_tokens_per_second")
            ),
        )
    return shown


def run(model: Any, tokenizer: PreTrainedTokenizerBase, text: str, wanted: int, console: Console) -> Any:
    ids = tokenizer(text, return_tensors="pt").input_ids.to(model.device)
    positions = getattr(model.config, "max_position_embeddings", CONTEXTS[-1] + CONTINUED)
    room = min(positions - CONTINUED, ids.shape[1] - 1)  # the longest context that still has room to decode
    length = min(wanted, room)
    if length < 64:
        raise SystemExit(f"nothing to show on {length} tokens: --length and the document must have at least 64")
    apart = (min(context, room) for context in CONTEXTS)
    contexts = sorted({c for c in apart if not length - num_scored(length) < c < length} | {length})
    console.print(f"document: {ids.shape[1]:,} tokens; reading {contexts[-1]:,}, reporting at {length:,}")
    results = {}
    columns = (TextColumn("{task.description:12}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        for name, options in VARIANTS.items():
            task = progress.add_task(name, total=contexts[-1])
            if options is not None:
                model.convert_attention(**options)
            results[name] = measure(model, ids, contexts, length, lambda n, task=task: progress.advance(task, n))
            model.revert_attention()
    for result in results.values():
        result["continuation"] = tokenizer.decode(result["continuation"])
    return results, length, tokenizer.decode(ids[0, length - 40 : length])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=EMBEDDED, help="a Hub id or a folder (default: %(default)s)")
    parser.add_argument("--text", type=Path, help="a text file (default: CPython's language reference)")
    parser.add_argument("--length", type=int, default=4096, help="tokens to report at (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("demo_output"), help="folder for the results")
    options = parser.parse_args()
    console = Console()
    console.print(f"loading {options.model}")
    model, tokenizer = load(options.model)
    results, length, before = run(model, tokenizer, document(options.text), options.length, console)
    shown = table(results, length)
    console.print(shown)
    console.print(f"[bold]…{before}[/bold]", highlight=False)
    for name, result in results.items():
        console.print(f"  [bold]{name}[/bold]: {result['continuation']!r}", highlight=False)
    console.print(
        "\nThe linear conversion is untrained: what lies beyond its window of 64 tokens reaches it only through "
        "feature maps that have not learned this model yet, so it loses quality until training recovers it. Sparse "
        "attention needs no training, but what has left its window is gone."
    )
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "demo.json").write_text(json.dumps({"length": length, "variants": results}, indent=1) + "\n")
    with (options.out / "demo.txt").open("w", encoding="utf-8") as file:
        Console(file=file, width=120).print(shown)
    curves(results, options.out / "demo.png")
    console.print(f"\nwritten: {options.out / 'demo.txt'}, demo.json, demo.png")


if __name__ == "__main__":
    main()
