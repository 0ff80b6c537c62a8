"""A model on many processes.

``fsdp2`` and ``zero`` are the strategies, ``fit_strategy`` fits a model to one, ``distributed``
lays it out over ranks, ``whole_tensors`` gathers it, ``sharded_checkpoints`` stores its parts.
"""
