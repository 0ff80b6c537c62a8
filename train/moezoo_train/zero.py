"""Where configurations of earlier versions look for :mod:`moezoo_train.parallel.zero`."""

from moezoo_train.parallel.zero import ZeROStrategy as ZeROStrategy
