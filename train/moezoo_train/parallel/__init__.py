"""Training on many processes.

``fsdp2`` and ``zero`` are the strategies, ``fit_strategy`` parallelizes a model for one,
``distributed`` shards it over ranks, ``state_dicts`` gathers and shards state dicts, and
``sharded_checkpoints`` stores the shards.
"""
