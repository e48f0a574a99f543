"""Print the bytes a layer needs beyond what it gets: python recipes/scratch.py prefill "linear elu" 8192 float32

For a prefill the output is not counted either. Peak memory of a process only grows, so each measurement is a process of
its own. Reads /proc: Linux only.
"""

from __future__ import annotations

import ctypes
import functools
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from layers import Bench
from suites import sdpa

from hf_effattn.ops.linear import chunked, gradient

Run = Callable[[], list[torch.Tensor]]
AUTOGRAD = ", plain autograd"  # appended to a layer's name: without the backward pass of its own


def resident(key: str) -> int:
    """Return VmRSS (now) or VmHWM (peak) of this process in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


def prefill(bench: Bench, name: str, length: int) -> Run:
    """One prompt; what it returns, the output, is not to be counted."""
    layer, tensors = bench.mechanism(name), bench.inputs(length)

    def run() -> list[torch.Tensor]:
        with torch.inference_mode():
            return [layer(*tensors, scale=bench.scale)]

    return run


def train(bench: Bench, name: str, length: int) -> Run:
    """Forward and backward; the output and the gradients of the inputs count."""
    tensors = [x.requires_grad_() for x in bench.inputs(length)]
    gradient = torch.ones(tensors[0].shape, dtype=bench.dtype)
    function, learned = sdpa, []
    if name != "dense SDPA":
        layer = bench.mechanism(name.removesuffix(AUTOGRAD))
        function, learned = functools.partial(layer, scale=bench.scale), list(layer.parameters())

    def run() -> list[torch.Tensor]:
        torch.autograd.grad(function(*tensors), [*tensors, *learned], gradient)
        return []

    return run


def scratch(run: Run) -> int:
    """Return the bytes that a run needs at its peak beyond what was there before, outputs not counted."""
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = resident("VmRSS")
    outputs = run()
    return max(resident("VmHWM") - before - sum(x.nbytes for x in outputs), 0)


def measured(what: str, name: str, length: int, dtype: str) -> int:
    """Measure in a process of its own."""
    command = [sys.executable, __file__, what, name, str(length), dtype]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


if __name__ == "__main__":
    torch.set_num_threads(1)
    what, name, length, dtype = sys.argv[1:]
    bench, prepare = Bench(dtype=getattr(torch, dtype)), {"prefill": prefill, "train": train}[what]
    if name.endswith(AUTOGRAD):
        gradient.linear_attention = chunked.in_segments
    run = prepare(bench, name, int(length))
    run()  # libraries allocate buffers of their own, and make kernels for each shape, once
    ctypes.CDLL(None).malloc_trim(0)  # what was freed is given back, so that it counts when it is needed again
    print(scratch(run))
