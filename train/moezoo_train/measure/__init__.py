"""A run's measurements: losses, expert load, throughput, progress, and the table at its end."""
