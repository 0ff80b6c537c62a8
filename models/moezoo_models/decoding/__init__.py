"""Decoding without what only training and analysis want."""
