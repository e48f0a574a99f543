"""Measure attention side by side: python recipes/benchmark.py --suite prefill decode train memory --out results.json

All variants of a suite run in turn, several rounds, beside dense attention and one matrix product (`gemm1k`, what the
machine gives); minimum is compared with minimum. Times of different runs or machines mean nothing: quote the ratios.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads distort small operations; set before torch loads

import argparse
import contextlib
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import scratch
import suites
import torch
import transformers
from layers import CONFIGS, SHAPES, Bench
from plots import ratios
from rich.console import Console
from tables import BASELINES, markdown
from tqdm import tqdm

import hf_effattn
from hf_effattn.ops.linear import CHUNK_SIZE

LENGTHS = {
    "prefill": [1024, 4096, 16384, 32768],
    "crossover": [128, 256, 512, 768, 1024, 2048],
    "decode": [1024, 8192, 65536],
    "draft": [1024, 8192, 65536],
    "train": [2048, 8192],
    "model": [512, 2048, 8192],
    "memory": [16384, 32768, 65536],
}
TRAINED = 8192  # tokens of the training step whose memory is measured


def timed(runs: dict[Any, suites.Run], rounds: int, wait: Callable[[], None]) -> dict[Any, float]:
    """Least seconds of each run over interleaved rounds; short runs are repeated for some 30 ms in each.

    Args:
        wait: Waits until the device has done its work.
    """
    best = dict.fromkeys(runs, float("inf"))
    for run in runs.values():
        run()
    for name in tqdm(list(runs) * rounds, leave=False):
        began = time.perf_counter()
        while True:
            wait()
            start = time.perf_counter()
            runs[name]()
            wait()
            end = time.perf_counter()
            best[name] = min(best[name], end - start)
            if end - began > 0.03:
                break
    return best


def memory(lengths: list[int], dtype: str) -> dict[str, dict[int, dict[str, float]]]:
    """Megabytes beyond inputs and outputs, of prefills and of training steps."""
    trained = ["dense SDPA", *CONFIGS, "linear elu" + scratch.AUTOGRAD, "linear hedgehog" + scratch.AUTOGRAD]
    jobs = [("prefill", name, length) for length in lengths for name in CONFIGS]
    jobs += [("train", name, min(TRAINED, max(lengths))) for name in trained]
    found: dict[str, dict[int, dict[str, float]]] = {}
    for what, name, length in tqdm(jobs, leave=False):
        bytes_ = scratch.measured(what, name, length, dtype)
        found.setdefault(what, {}).setdefault(length, {})[name] = round(bytes_ / 2**20, 1)
    return found


def size(text: str) -> int:
    return int(text[:-1]) * 1024 if text.endswith("k") else int(text)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", nargs="+", choices=LENGTHS, default=["prefill", "decode"])
    parser.add_argument("--lengths", nargs="+", type=size, help="such as 4k, for all suites; default: each has its own")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--shape", choices=SHAPES, default="smollm2-135m", help="heads of the layer")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="write all numbers as JSON, tables as .md, and a plot as .png")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    torch.set_num_threads(options.threads)
    bench = Bench(options.shape, getattr(torch, options.dtype), options.device)
    device = torch.cuda.get_device_name() if options.device.startswith("cuda") else f"{platform.machine()} CPU"
    result: dict[str, Any] = {"device": device, "heads": bench.heads.__dict__, "seconds": {}, "megabytes": {}}
    result["versions"] = {m.__name__: m.__version__ for m in (hf_effattn, torch, transformers)}
    result |= {key: getattr(options, key) for key in ("dtype", "rounds", "threads")}
    wait = torch.cuda.synchronize if options.device.startswith("cuda") else lambda: None
    for suite in options.suite:
        lengths = options.lengths or LENGTHS[suite]
        if suite == "memory":
            result["megabytes"] = memory(lengths, options.dtype)
            continue
        make = {"crossover": suites.prefill}.get(suite) or getattr(suites, suite)
        with contextlib.nullcontext() if suite == "train" else torch.inference_mode():
            made = {length: make(bench, length) for length in lengths}
            best = timed({(n, name): run for n in lengths for name, run in made[n].items()}, options.rounds, wait)
        result["seconds"][suite] = {n: {name: best[n, name] for name in made[n]} for n in lengths}
    if set(BASELINES) & set(result["seconds"]):
        result["gemm share"] = gemm_share(bench, result["seconds"])
    text = markdown(result)
    Console(width=160).print(text, markup=False, highlight=False)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=1) + "\n")
        options.out.with_suffix(".md").write_text(text)
        if result["seconds"]:
            ratios(result["seconds"], options.out.with_suffix(".png"))
        print(f"written: {options.out}, with tables in .md and a plot in .png")


def gemm_share(bench: Bench, seconds: dict[str, Any]) -> dict[int, float]:
    """Share of the yardstick's rate that linear attention of given features reaches, by length."""
    rows = {n: row for n, row in seconds.get("prefill", {}).items() if suites.GIVEN in row}
    flops = bench.chunk_flops(suites.FEATURES, CHUNK_SIZE)
    return {n: flops * n / row[suites.GIVEN] / (2 * 1024**3 / row["gemm1k"]) for n, row in rows.items()}


if __name__ == "__main__":
    main()
