"""Training on from a checkpoint: fully, by low-rank adapters, or by rows of a memory."""
