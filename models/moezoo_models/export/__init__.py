"""Models in the formats of other programs: GGUF files, and mixtures of ours as stock ones."""
