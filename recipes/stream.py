"""Read a stream far beyond a model's trained length: python recipes/stream.py --tokens 200000

A window with sinks reads the text once, through a cache of constant size. Beside it the same text by windowed
recomputation: each quarter of a window is read anew behind three quarters before it, from position 0 on, by dense
attention; that takes four times as long, so `--compare` may limit it to the stream's last tokens. Shows perplexity of
both on the tokens that both have read, of the whole stream and of its last tenth, and the bytes of the cache; writes
them as JSON.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from demo import cache_bytes, document
from models import EMBEDDED, load
from rich.console import Console
from rich.progress import track
from torch.nn.functional import cross_entropy
from transformers import DynamicCache, PreTrainedModel

import hf_effattn  # noqa: F401  (gives models convert_attention)
from hf_effattn.cache import with_cache


def losses(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the loss of each token `[T]`."""
    return cross_entropy(logits[0].float(), targets[0], reduction="none")


@torch.inference_mode()
def streamed(model: PreTrainedModel, ids: torch.Tensor, stretch: int) -> tuple[torch.Tensor, list[int]]:
    """Return the loss of every token after the first, and the bytes of the cache after each stretch."""
    cache, found, sizes = DynamicCache(config=model.config), [], []
    for start in track(range(0, ids.shape[1] - 1, stretch), "streaming"):
        part = ids[:, start : start + stretch + 1]
        found.append(losses(model(part[:, :-1], **with_cache(model, cache)).logits, part[:, 1:]))
        sizes.append(cache_bytes(cache))
    return torch.cat(found), sizes


@torch.inference_mode()
def recomputed(model: PreTrainedModel, ids: torch.Tensor, stretch: int, tokens: int) -> torch.Tensor:
    """Return the loss of the last `tokens`, each quarter of a stretch behind the three before it."""
    found, quarter = [], stretch // 4
    for start in track(range(ids.shape[1] - 1 - tokens, ids.shape[1] - 1, quarter), "recomputing"):
        first = max(start - stretch + quarter, 0)
        part = ids[:, first : start + quarter + 1]
        found.append(losses(model(part[:, :-1], use_cache=False).logits, part[:, 1:])[start - first :])
    return torch.cat(found)


def summary(loss: torch.Tensor, compared: int, tenth: int, seconds: float) -> dict[str, Any]:
    parts = {"whole": loss, "compared": loss[-compared:], "last_tenth": loss[-tenth:]}
    if len(loss) == compared:
        del parts["whole"]
    return {key: float(part.mean().exp()) for key, part in parts.items()} | {"seconds": round(seconds)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=EMBEDDED, help="a Hub id, a folder, or the embedded default")
    parser.add_argument("--text", type=Path, help="a text file; by default CPython's language reference")
    parser.add_argument("--tokens", type=int, default=20_000, help="length of the stream")
    parser.add_argument("--compare", type=int, help="last tokens that recomputation reads too; by default all")
    parser.add_argument("--window", type=int, default=1020)
    parser.add_argument("--num-sinks", type=int, default=4)
    parser.add_argument("--position-mode", default="rolling", choices=["rolling", "absolute"])
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"])
    parser.add_argument("--out", type=Path, default=Path("stream_output/stream.json"))
    options = parser.parse_args()
    console, stretch = Console(), options.window + options.num_sinks
    model: Any
    model, tokenizer = load(options.model, getattr(torch, options.dtype))
    ids = tokenizer(document(options.text), return_tensors="pt").input_ids[:, : options.tokens + 1]
    if ids.shape[1] <= options.tokens:
        console.print(f"the text has {ids.shape[1]} tokens only; it is read again from its beginning behind its end")
        ids = ids.repeat(1, -(-(options.tokens + 1) // ids.shape[1]))[:, : options.tokens + 1]
    tenth = max(options.tokens // 10, 1)
    compared = min(max(options.compare or options.tokens, tenth), options.tokens)
    results: dict[str, Any] = {key: value for key, value in vars(options).items() if key not in ("text", "out")}
    results["compare"] = compared
    start = time.perf_counter()
    loss = recomputed(model, ids, stretch, compared)
    results["recomputed"] = summary(loss, compared, tenth, time.perf_counter() - start)
    model.convert_attention(
        "sparse", window=options.window, num_sinks=options.num_sinks, position_mode=options.position_mode
    )
    start = time.perf_counter()
    loss, sizes = streamed(model, ids, stretch)
    results["streamed"] = summary(loss, compared, tenth, time.perf_counter() - start)
    results["cache_bytes"] = {"after_the_first_stretch": sizes[0], "most_after_that": max(sizes[1:], default=sizes[0])}
    for key in ("compared", "last_tenth"):
        results[f"{key}_ratio"] = results["streamed"][key] / results["recomputed"][key]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(results, indent=1) + "\n")
    console.print_json(data=results)


if __name__ == "__main__":
    main()
