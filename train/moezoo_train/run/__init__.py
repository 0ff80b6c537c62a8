"""A training run.

``cli`` reads its configuration, ``beforehand`` refuses what would fail later, ``module`` computes
losses and steps, ``guard`` judges each step, ``callbacks`` save, ``run_directory`` knows what is
there already.
"""
