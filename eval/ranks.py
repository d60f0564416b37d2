"""Several processes on one sweep, as `torchrun` and `accelerate launch` start them."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta

import torch
from torch import distributed

__all__ = ["Ranks"]

_LONGEST = timedelta(days=7)  # that one process may have to wait for another's last unit


@dataclass(frozen=True, slots=True)
class Ranks:
    """Which of how many processes this is."""

    rank: int = 0
    ranks: int = 1

    @classmethod
    def here(cls) -> Ranks:
        """As the launcher's environment says; one process where there is none."""
        return cls(int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))

    @property
    def first(self) -> bool:
        """Whether this is the process that prints and writes the report."""
        return self.rank == 0

    def mine(self, number: int) -> bool:
        """Whether unit `number` is this process's to run."""
        return number % self.ranks == self.rank

    def wait(self) -> None:
        """Come back when all processes have called this."""
        if self.ranks == 1:
            return
        if not distributed.is_initialized():
            distributed.init_process_group("gloo", timeout=_LONGEST)
        distributed.barrier()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
