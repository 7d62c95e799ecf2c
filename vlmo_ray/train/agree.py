"""How workers agree on going on: one that stopped alone would leave the others waiting."""

from __future__ import annotations

import enum
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from vlmo_ray.data.read import ShardError
from vlmo_ray.errors import UserError

T = TypeVar("T")


class Notice(enum.IntEnum):
    """What a worker has been told from outside; the gravest one counts for all."""

    NONE = 0
    RESIZE = 1  # there is room for more workers: save, end, and be started again
    PREEMPTED = 2  # a node is about to go: save, end, and be started again without it
    STOP = 3  # save and end
    UNREADABLE = 4  # a worker cannot read its data: save what is done, and end
    FAILED = 5  # a worker has another problem, such as a lost lease: end without saving


class Agreement:
    """Problems that this worker alone knows of, kept until all workers agree on how to go on."""

    def __init__(self, world: int = 1, device: torch.device | str = "cpu"):
        self._world, self._device = world, device
        self.problem = ""  # the first one of this worker
        self._gravity = Notice.NONE  # of its problems

    def attempt(self, make: Callable[..., T], *given: Any) -> T | None:
        """What `make` returns. None if it raises a UserError, whose sentence becomes the problem."""
        try:
            return make(*given)
        except UserError as error:
            self.note(str(error), Notice.UNREADABLE if isinstance(error, ShardError) else Notice.FAILED)
            return None

    def note(self, problem: str, gravity: Notice = Notice.FAILED) -> None:
        if problem:
            self.problem = self.problem or problem
            self._gravity = max(self._gravity, gravity)

    def forget(self) -> None:
        """Forgets this worker's problem, of which all workers know."""
        self.problem, self._gravity = "", Notice.NONE

    def reach(self, where: str, told: Notice = Notice.NONE) -> tuple[str, Notice]:
        """(sentence, notice), equal on all workers, which must all call.

        The sentence is "`where`: problem" of the first worker that has one, "" if none has; with one, the notice is
        `UNREADABLE` or `FAILED`.
        """
        told = max(told, self._gravity)
        sentence = f"{where}: {self.problem}" if self.problem else ""
        if self._world == 1:
            return sentence, told
        both = torch.tensor([bool(sentence), told], dtype=torch.int32, device=self._device)
        dist.all_reduce(both, dist.ReduceOp.MAX)
        troubled, gravest = both.tolist()
        if not troubled:
            return "", Notice(gravest)
        sentences: list[str] = [""] * self._world
        dist.all_gather_object(sentences, sentence)
        return next(found for found in sentences if found), Notice(gravest)

    def stops(self, where: str) -> str:
        """The sentence of `reach` alone."""
        return self.reach(where)[0]
