"""Model directories as files: found, read, and checked before anything in them is used.

Nothing here knows of our models; :mod:`moezoo_models.checkpoints` builds and writes them.
"""

__all__: list[str] = []
