"""Text to batches.

``prepare`` writes tokens, ``windows`` cuts batches of them, ``datamodule`` serves these.
"""
