"""Measure attention layers side by side: python recipes/benchmark.py --suite prefill decode memory --out results.json

All variants of a suite run in turn, several rounds, beside dense attention and one matrix product (`gemm1k`, what the
machine gives); minimum is compared with minimum. Times of different runs or machines mean nothing: quote the ratios.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads distort small operations; set before torch loads

import argparse
import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from layers import CONFIGS, HEADS, SCALE, inputs, mechanism
from tables import markdown
from torch.nn.functional import scaled_dot_product_attention
from tqdm import tqdm
from transformers.cache_utils import DynamicLayer

import hf_effattn
from hf_effattn.cache import EffAttnCacheLayer

Run = Callable[[], object]


def prefill_runs(length: int, dtype: torch.dtype) -> dict[str, Run]:
    """One whole prompt through one layer, feature maps included."""
    q, k, v = inputs(length, dtype)
    a = torch.randn(1024, 1024).to(dtype)
    runs: dict[str, Run] = {
        "gemm1k": lambda: a @ a,
        "dense SDPA": lambda: scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True),
    }
    for name in CONFIGS:
        layer = mechanism(name, dtype)
        runs[name] = lambda layer=layer: layer(q, k, v, scale=SCALE)  # type: ignore[misc]
    return runs


def decode_runs(length: int, dtype: torch.dtype) -> dict[str, Run]:
    """One more token after `length` of them, state and cache update included."""
    q, k, v = inputs(length, dtype)
    one = [x[:, :, -1:] for x in (q, k, v)]
    runs: dict[str, Run] = {}

    def dense() -> Run:
        layer = DynamicLayer()
        layer.update(k, v)

        def step() -> None:
            keys, values = layer.update(one[1], one[2])
            scaled_dot_product_attention(one[0], keys, values, enable_gqa=True)
            layer.crop(-1)

        return step

    def converted(name: str) -> Run:
        net, layer = mechanism(name, dtype), EffAttnCacheLayer()

        def call(*tokens: torch.Tensor) -> None:
            layer.bind("benchmark")
            layer.update(tokens[1], tokens[2])
            layer.claim(tokens[1].shape[2])
            net(*tokens, scale=SCALE, cache_layer=layer)

        call(q, k, v)
        return lambda: call(*one)

    base = torch.zeros(1, 3, 64, 64)
    runs["add_ dispatch"] = lambda: base.add_(1.0)
    runs["dense DynamicCache"] = dense()
    return runs | {name: converted(name) for name in CONFIGS}


def timed(runs: dict[Any, Run], rounds: int) -> dict[Any, float]:
    """Least seconds of each run over interleaved rounds; short runs are repeated for some 30 ms in each."""
    best = dict.fromkeys(runs, float("inf"))
    for run in runs.values():
        run()
    for name in tqdm(list(runs) * rounds, leave=False):
        began = time.perf_counter()
        while True:
            start = time.perf_counter()
            runs[name]()
            end = time.perf_counter()
            best[name] = min(best[name], end - start)
            if end - began > 0.03:
                break
    return best


def scratch_bytes(name: str, length: int, dtype: str) -> int:
    """Peak memory of a prefill beyond inputs and output, measured in a process of its own (see `scratch.py`)."""
    command = [sys.executable, str(Path(__file__).with_name("scratch.py")), name, str(length), dtype]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def size(text: str) -> int:
    return int(text[:-1]) * 1024 if text.endswith("k") else int(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", nargs="+", choices=("prefill", "decode", "memory"), default=["prefill", "decode"])
    parser.add_argument("--lengths", nargs="+", type=size, default=[1024, 4096, 16384], help="of prompts, such as 4k")
    parser.add_argument("--contexts", nargs="+", type=size, default=[1024, 8192, 65536], help="before a decoding step")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="write all numbers as JSON, and a table as .md")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    dtype = getattr(torch, options.dtype)
    versions = {
        "hf_effattn": hf_effattn.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    result: dict[str, Any] = {"versions": versions, "machine": platform.machine(), "heads": HEADS.__dict__}
    result |= {"seconds": {}, "scratch": {}}
    result |= {key: getattr(options, key) for key in ("dtype", "rounds", "threads")}
    for suite, makes, sizes, dense in (
        ("prefill", prefill_runs, options.lengths, "dense SDPA"),
        ("decode", decode_runs, options.contexts, "dense DynamicCache"),
    ):
        if suite not in options.suite:
            continue
        with torch.inference_mode():
            runs = {(length, name): run for length in sizes for name, run in makes(length, dtype).items()}
            best = timed(runs, options.rounds)
        print(f"\n{suite}: time of dense attention / time ({options.dtype}, {options.threads} thread)")
        for length in sizes:
            result["seconds"].setdefault(suite, {})[length] = {name: best[n, name] for n, name in best if n == length}
            ratios = "  ".join(f"{name} {best[length, dense] / best[length, name]:.2f}x" for name in CONFIGS)
            print(f"{length:>7,}  {ratios}")
        if suite == "decode":
            flat = "  ".join(f"{name} {best[sizes[-1], name] / best[sizes[0], name]:.2f}" for name in CONFIGS)
            print(f"time of a step at {sizes[-1]:,} / at {sizes[0]:,}:  {flat}")
    if "memory" in options.suite:
        print("\nmemory: MB of a prefill beyond inputs and output")
        for length in (16384, 32768, 65536):
            found = {name: scratch_bytes(name, length, options.dtype) for name in CONFIGS}
            result["scratch"][length] = found
            print(f"{length:>7,}  " + "  ".join(f"{name} {value / 2**20:.0f}" for name, value in found.items()))
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=1) + "\n")
        options.out.with_suffix(".md").write_text(markdown(result))
        print(f"\nwritten: {options.out} and {options.out.with_suffix('.md').name}")


if __name__ == "__main__":
    main()
