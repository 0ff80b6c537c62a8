"""Dense architectures of transformers as ours: their fields, and the layout of their tensors."""
