"""What happens to a run, given on its command line as any callback of a user is."""

import os
import signal

from lightning.pytorch import Callback


class Signal(Callback):
    """Send a rank a signal at the beginning of a step.

    Args:
        rank: who gets it.
        step: finished steps by then.
        number: of the signal.
    """

    def __init__(self, rank: int, step: int, number: int) -> None:
        self.rank, self.step, self.number = rank, step, number

    def on_train_batch_start(self, trainer, module, batch, batch_idx) -> None:
        if trainer.global_rank == self.rank and trainer.global_step == self.step:
            os.kill(os.getpid(), self.number)
            self.step = -1


class Interrupt(Callback):
    """Send SIGINT, as Ctrl-C does.

    Args:
        when: ``setup``: before training; ``group``: in the third step, to the whole process group.
    """

    def __init__(self, when: str) -> None:
        self.when = when

    def setup(self, trainer, module, stage) -> None:
        if self.when == "setup":
            os.kill(os.getpid(), signal.SIGINT)

    def on_train_batch_start(self, trainer, module, batch, batch_idx) -> None:
        if self.when == "group" and batch_idx == 4:
            os.killpg(0, signal.SIGINT)


class Poison(Callback):
    """Multiply the loss of some steps by a value.

    Args:
        value: nan, inf, or large.
        steps: finished steps by then.
    """

    def __init__(self, value: str, steps: list[int]) -> None:
        self.value, self.steps = float(value), steps

    def on_train_start(self, trainer, module) -> None:
        forward = module.model.forward

        def poisoned(*args, **kwargs):
            output = forward(*args, **kwargs)
            if module.training and trainer.global_step in self.steps:
                output.loss = output.loss * self.value
            return output

        module.model.forward = poisoned
