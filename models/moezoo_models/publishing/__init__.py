"""Model directories on the Hugging Face Hub: what is sent, and the page that describes it.

Begin at :func:`moezoo_models.publishing.push.push`.
"""

__all__: list[str] = []
