"""Memory, traffic and time of a training run on many GPUs, before there is any of them.

``command`` reads a training configuration as `moezoo fit` does, ``setup`` builds its model without
weights, ``trace`` follows a forward and a backward pass through shapes alone, ``layouts`` holds the
formulas of each layout, ``choices`` which of them `moezoo fit` can run, ``machine`` the GPUs;
``estimate`` puts these together and ``figure`` draws them against the number of GPUs.
"""

from moezoo_train.plan.command import run

__all__ = ["run"]
