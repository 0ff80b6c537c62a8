"""Hugging Face directories in and out: written whole or not at all, checked when read."""
