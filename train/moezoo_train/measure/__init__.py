"""What a run reports: losses, expert load, throughput, progress, and the table at its end."""
