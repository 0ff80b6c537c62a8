"""The `moezoo` command's own parts; `import moezoo` does not load them."""
