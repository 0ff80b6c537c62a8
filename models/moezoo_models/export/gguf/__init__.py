"""GGUF files, which llama.cpp runs: what it computes as transformers does, and nothing else."""

from moezoo_models.export.gguf.export import GGUF_SUFFIX, export_gguf

__all__ = ["GGUF_SUFFIX", "export_gguf"]
