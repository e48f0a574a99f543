"""Compile the Triton kernels for GPUs that are not there: python tests/kernel_compiler.py bf16 head 80 90

Prints the bytes of shared memory that each kernel needs, as JSON. A process of its own, since kernels are made either
for a GPU or for Triton's interpreter.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
from triton import compile as compile_kernel
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from hf_effattn.ops.linear import kernels, triton
from hf_effattn.ops.linear.state import EPS

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
FEATURES, VALUE_DIM, GROUPS, CHUNK = 256, 128, 4, 64  # hedgehog on Llama 3 8B
FLOAT32 = {"log_decay", "state", "state_after", "normalizer_before", "denominators"}


def source(kernel: Any, constants: dict[str, Any], pointers: dict[str, str]) -> ASTSource:
    """Return a kernel for tensors and strides that are multiples of 16, which is what Triton finds in most calls."""
    names = kernel.arg_names
    constants = {name: value for name, value in constants.items() if name in names}
    signature = {name: "constexpr" if name in constants else pointers.get(name, "i32") for name in names}
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in names if name not in constants}
    return ASTSource(kernel, signature, {(names.index(name),): value for name, value in constants.items()}, aligned)


def main(name: str, decay: str, *architectures: str) -> None:
    dtype = DTYPES[name]
    pointers = dict.fromkeys(FLOAT32, "*fp32") | dict.fromkeys(("query", "key", "value", "output"), f"*{name}")
    pointers["kv_before"] = "*bf16" if name == "bf16" else "*fp32"
    flags = {"HEAD_DECAY": decay == "head", "FEATURE_DECAY": decay == "feature"}
    common = {"F": FEATURES, "V": VALUE_DIM, "EPS": EPS, **flags}
    if decay == "none":
        common["log_decay"] = None
    chunk = 16 if decay == "feature" else CHUNK
    sides = triton.chunk_sides(chunk, FEATURES, VALUE_DIM)
    chunks = {**common, **sides, "PRECISION": triton.precision(dtype), "WRITE_DENOMINATORS": True}
    step = {**common, **triton.step_sides(GROUPS, FEATURES, VALUE_DIM)}
    found = {}
    for kernel, constants, options in (
        (kernels.chunk_states, chunks, triton.chunk_options(dtype)),
        (kernels.chunk_outputs, chunks, triton.chunk_options(dtype)),
        (kernels.one_token, step, triton.STEP_OPTIONS),
    ):
        for architecture in architectures:
            target = GPUTarget("cuda", int(architecture), 32)
            compiled = compile_kernel(source(kernel, constants, pointers), target=target, options=options)
            found[f"{kernel.__name__} sm_{architecture}"] = compiled.metadata.shared
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
