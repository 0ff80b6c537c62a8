"""Dense checkpoints into mixtures of experts, directory to directory, one tensor at a time."""
