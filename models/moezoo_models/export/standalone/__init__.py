"""Models with code of their own: one file of plain torch, which transformers runs without moezoo.

Begin at :func:`moezoo_models.export.standalone.export.export_with_code`.
"""

__all__: list[str] = []
