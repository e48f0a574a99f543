"""Processes of tests, alone or as ranks of one job. All are forked from one that has imported what takes seconds."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterable
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

TIMEOUT = 150
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["accelerate", "peft", "distributed_worker"])


def start(job: Callable[..., None], *arguments: Any, log: Path, env: dict[str, str] | None = None) -> BaseProcess:
    """Start a process that does a job with one thread.

    Args:
        job: A function of a module; the arguments are pickled.
        log: Where it writes what it prints.
        env: What its environment has besides ours.
    """
    process = CONTEXT.Process(target=_work, args=(job, arguments, log, env or {}), daemon=True)
    process.start()
    return process


def _work(job: Callable[..., None], arguments: tuple[Any, ...], log: Path, env: dict[str, str]) -> None:
    with log.open("w") as file:
        os.dup2(file.fileno(), sys.stdout.fileno())
        os.dup2(file.fileno(), sys.stderr.fileno())
    os.environ.update(env)
    torch.set_num_threads(1)
    faulthandler.dump_traceback_later(TIMEOUT - 10)
    job(*arguments)


def kill_where_it_waits(job: Callable[..., None], *arguments: Any, log: Path) -> None:
    """Start a process, the last argument of whose job is a function that tells us that it waits, and does so; kill it
    then."""
    reader, writer = CONTEXT.Pipe(duplex=False)
    process = start(job, *arguments, Waiting(writer), log=log)
    writer.close()  # ours, so that we see the end of theirs
    try:
        assert reader.poll(TIMEOUT), log.read_text()
        reader.recv()
    except EOFError:
        raise AssertionError(log.read_text()) from None
    finally:
        process.kill()
        process.join()
    assert process.exitcode == -signal.SIGKILL


class Waiting:
    """Tells that it waits, and goes no further."""

    def __init__(self, writer: Any) -> None:
        self.writer = writer

    def __call__(self) -> None:
        self.writer.send(True)
        while True:
            signal.pause()


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


def exit_codes(processes: Iterable[BaseProcess]) -> list[int | None]:
    """Wait for processes; if one fails or takes too long, all are ended."""
    processes = list(processes)
    running = {process.sentinel: process for process in processes}
    try:
        while running:
            done = [running.pop(sentinel) for sentinel in wait(list(running), TIMEOUT)]
            if not done or any(process.exitcode for process in done):
                break
    finally:
        for process in processes:
            process.kill()
            process.join()
    return [process.exitcode for process in processes]
