"""Elementwise work over many checkpoints at once: blocks read, worked and written by threads, in a fixed amount of memory.

A block of one tensor is read from every source into buffers its thread keeps, `work` fills the output block, and it is written
in place. torch, `pread` and `pwrite` release the interpreter, so threads are enough. Memory: threads x (sources + 1) x block.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch
from torch import Tensor

from temperament.delta.stream import BLOCK, Source
from temperament.delta.tensorfile import Writer

Work = Callable[[str, int, list[Tensor], Tensor | None], None]


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def one_thread_each():
    """Inside, torch uses one thread an operation: the sweep's own threads share the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Buffers(threading.local):
    """For each thread, one growing buffer a slot and dtype: `buffers(slot, numel, dtype)` is overwritten by the next call."""

    def __call__(self, slot: object, numel: int, dtype: torch.dtype) -> Tensor:
        held = self.__dict__.get((slot, dtype))
        if held is None or held.numel() < numel:
            held = self.__dict__[(slot, dtype)] = torch.empty(numel, dtype=dtype)
        return held[:numel]


def sweep(
    work: Work,
    sources: Sequence[Source],
    names: Iterable[str] | None = None,
    writer: Writer | None = None,
    block: int = BLOCK,
    threads: int | None = None,
) -> None:
    """work(name, start, blocks, out) for every block of every name.

    `blocks` are flat pieces, one a source; `out` (None without a writer) is to be filled, in the dtype the writer has for the
    name without its component. Both are reused: copy what must last. The order is free and work must not depend on it. The
    first error stops the sweep and is raised.
    """
    buffers, names = Buffers(), list(sources[0].names if names is None else names)
    stop = threading.Event()

    def one(task: tuple[str, int, int]) -> None:
        name, start, end = task
        if stop.is_set():
            return
        try:
            reused = [buffers(i, end - start, source.entry(name).dtype) for i, source in enumerate(sources)]
            blocks = [source.block(name, start, end, out) for source, out in zip(sources, reused, strict=True)]
            out = None
            if writer is not None:
                bare = name.split("/", 1)[1]
                out = buffers("out", end - start, writer.entry(bare).dtype)
            work(name, start, blocks, out)
            if writer is not None:
                writer.block(bare, start, out)
        except BaseException:
            stop.set()
            raise

    tasks = ((name, *at) for name in names for at in sources[0].blocks(name, block))
    with one_thread_each(), ThreadPoolExecutor(threads or cores()) as pool:
        for _ in pool.map(one, tasks):
            pass
