"""The decoder language model: configuration, attention, blocks, initialization."""
