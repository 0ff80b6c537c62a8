"""Loss, perplexity, bits per byte, and lm-eval's tasks."""
