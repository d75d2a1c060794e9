"""The learning rate of the first steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


class WarmFromTheStart:
    """Mixed into a Trainer: a warm-up of W steps goes 1, 2, ... W parts of W + 1 of the learning rate.

    transformers' begins with 0, so that the first step changes nothing: of a training of 30 steps the only one of its
    warm-up, and a thirtieth of the work.
    """

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """As Trainer's."""
        known = self.lr_scheduler
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        if known is None:
            warm_from_the_start(scheduler, self.args.get_warmup_steps(num_training_steps))
        return scheduler


def warm_from_the_start(scheduler: Any, steps: int) -> None:
    """Change a LambdaLR at its start: its warm-up of so many steps no longer begins with 0."""

    def warmed(factor: Callable[[int], float]) -> Callable[[int], float]:
        return lambda step: (step + 1) / (steps + 1) if step < steps else factor(step)

    for number, factor in enumerate(scheduler.lr_lambdas):
        if factor(0) == 0:
            scheduler.lr_lambdas[number] = warmed(factor)
            scheduler.optimizer.param_groups[number]["lr"] = scheduler.base_lrs[number] * scheduler.lr_lambdas[number](
                0
            )
    scheduler._last_lr = [group["lr"] for group in scheduler.optimizer.param_groups]
