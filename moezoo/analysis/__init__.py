"""Looking into layers: who is used, how evenly. `import moezoo` does not load it."""
