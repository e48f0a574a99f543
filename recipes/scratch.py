"""Print the bytes a prefill needs beyond inputs and output: python recipes/scratch.py "linear elu" 32768 float32

Peak memory of a process only grows, so each measurement is a process of its own. Reads /proc: Linux only.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from layers import SCALE, inputs, mechanism


def resident(key: str) -> int:
    """Return VmRSS (now) or VmHWM (peak) of this process in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


@torch.inference_mode()
def measure(name: str, length: int, dtype: torch.dtype) -> int:
    torch.set_num_threads(1)
    layer = mechanism(name, dtype)
    layer(*inputs(4096, dtype), scale=SCALE)  # libraries allocate their own buffers once
    query, key, value = inputs(length, dtype)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = resident("VmRSS")
    output = layer(query, key, value, scale=SCALE)
    return max(resident("VmHWM") - before - output.nbytes, 0)


if __name__ == "__main__":
    print(measure(sys.argv[1], int(sys.argv[2]), getattr(torch, sys.argv[3])))
