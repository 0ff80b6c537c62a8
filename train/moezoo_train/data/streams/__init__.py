"""Text that is tokenized while a model trains on it, part by part, and not kept."""
