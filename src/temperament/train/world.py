"""The processes of a run, as the loop needs them: a thin face on Accelerate.

Every process holds the whole effective batch and computes the rows `rank::size` of it; the gradients are sums, so one reduction
per optimizer step is exact whatever the number of processes. Mixed precision is autocast around the forward; the master
weights are what the model was loaded in (`precision.master`), and the choice is printed in the plan.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor

from temperament.errors import UserError, nearest

COMPUTE = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}


def speaks() -> bool:
    """Is this the process that writes and tells, of those there are?"""
    return PartialState().is_main_process


class World:
    def __init__(self, compute: str = "fp32", log_with: str | None = None, device: str = "auto", folder: Path | None = None):
        wanted = COMPUTE[compute]
        if log_with is not None and log_with not in map(str, get_available_trackers()):
            known = log_with in LOGGER_TYPE_TO_CLASS
            mend = (
                f"it is not installed: pip install {log_with}"
                if known
                else f"no such tracker; {nearest(log_with, LOGGER_TYPE_TO_CLASS)}"
            )
            raise UserError("log_with", log_with, mend)
        if AcceleratorState._shared_state and AcceleratorState().mixed_precision != wanted:
            AcceleratorState._reset_state()  # a second run of one Python process may compute in another dtype
        # Without a GPU Accelerate joins processes only when told that they are CPU processes; else each would train alone.
        cpu = device == "cpu" or (int(os.environ.get("WORLD_SIZE", "1")) > 1 and not torch.cuda.is_available())
        self.accelerator = Accelerator(mixed_precision=wanted, log_with=log_with, project_dir=folder, cpu=cpu)
        self.scale = 1024.0 if wanted == "fp16" else 1.0  # keeps small gradients of activations in the range of fp16

    rank = property(lambda self: self.accelerator.process_index)
    size = property(lambda self: self.accelerator.num_processes)
    main = property(lambda self: self.accelerator.is_main_process)
    device = property(lambda self: self.accelerator.device)

    def track(self, options: dict[str, Any]) -> None:
        """Open the trackers; local ones write below the folder that was given."""
        self.accelerator.init_trackers("temperament", config=options)

    def log(self, values: dict[str, float], step: int) -> None:
        self.accelerator.log(values, step=step)

    @contextmanager
    def autocast(self):
        with self.accelerator.autocast():
            yield

    def backward(self, loss: Tensor) -> None:
        (loss * self.scale if self.scale != 1 else loss).backward()

    @torch.no_grad()
    def reduce(self, tensors: Iterable[Tensor]) -> None:
        """Sum over processes, in place, one message for each dtype."""
        if self.size == 1:
            return
        by_dtype: dict[torch.dtype, list[Tensor]] = {}
        for t in tensors:
            by_dtype.setdefault(t.dtype, []).append(t)
        for group in by_dtype.values():
            flat = torch.cat([t.reshape(-1) for t in group])
            flat = self.accelerator.reduce(flat, "sum")
            for t, part in zip(group, flat.split([t.numel() for t in group]), strict=True):
                t.copy_(part.view_as(t))

    def total(self, values: dict[str, float]) -> dict[str, float]:
        """Sum of each value over processes; every process must bring the same keys."""
        if self.size == 1 or not values:
            return values
        flat = torch.tensor(list(values.values()), dtype=torch.float64, device=self.device)
        return dict(zip(values, self.accelerator.reduce(flat, "sum").tolist(), strict=True))

    def gather_rows(self, mine: list[Any], count: int) -> list[Any]:
        """Put the rows `rank::size` of every process together again in order; all processes get all rows."""
        if self.size == 1:
            return mine
        everyone = gather_object([mine])
        rows: list[Any] = [None] * count
        for rank, part in enumerate(everyone):
            rows[rank :: self.size] = part
        return rows

    def same(self, value: Any) -> Any:
        """The main process's value, on every process."""
        return value if self.size == 1 else broadcast_object_list([value])[0]

    def wait(self) -> None:
        self.accelerator.wait_for_everyone()
