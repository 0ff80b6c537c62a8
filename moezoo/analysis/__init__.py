"""Looking into layers: who is used, and for what. `import moezoo` does not load it."""
