"""Where configurations of earlier versions look for :mod:`moezoo_train.parallel.fsdp2`."""

from moezoo_train.parallel.fsdp2 import FSDP2Strategy as FSDP2Strategy
