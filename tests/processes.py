"""Python processes of tests, alone or as ranks of one job."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterable
from typing import Any

TIMEOUT = 150


def start(script: str, *arguments: str, **options: Any) -> subprocess.Popen[str]:
    """Start a Python script with one thread and without the Hub."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **options.pop("env", {})}
    return subprocess.Popen([sys.executable, script, *arguments], env=env, stdout=subprocess.PIPE, text=True, **options)


def ranks(number: int) -> list[dict[str, str]]:
    """Return the environment of each of `number` processes that know of each other."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = str(server.getsockname()[1])
    common = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "WORLD_SIZE": str(number),
        "LOCAL_WORLD_SIZE": str(number),
    }
    return [{**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(number)]


def return_codes(processes: Iterable[subprocess.Popen[str]]) -> list[int]:
    """Wait for processes; if one takes too long, all are ended."""
    processes = list(processes)
    try:
        for process in processes:
            process.communicate(timeout=TIMEOUT)
    finally:
        for process in processes:
            process.kill()
    return [process.returncode for process in processes]
