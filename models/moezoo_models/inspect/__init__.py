"""Inspecting a trained model: load and specialization of experts, sparsity, spectra, triggers."""
