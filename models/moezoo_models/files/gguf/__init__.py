"""GGUF files, the format of llama.cpp, read as the model directories that they stand for.

Begin at :func:`moezoo_models.files.gguf.copies.directory_of`.
"""

__all__: list[str] = []
