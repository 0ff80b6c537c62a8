"""The decoder language model: configuration, attention, blocks, initialization.

Its public names are those of :mod:`moezoo_models`.
"""

__all__: list[str] = []
