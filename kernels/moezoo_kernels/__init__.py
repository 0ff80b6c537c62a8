"""Fused gather/scatter ops for sparse feed-forward layers."""
