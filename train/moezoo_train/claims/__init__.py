"""Claims of papers that need an experiment of their own: runs by seed, a table, a verdict.

``verdict`` judges differences paired by seed, ``records`` keeps finished runs, ``report`` writes
what is left at the end, ``picture`` draws it. The experiments are ``carving``, ``hardening`` and
``recall``.
"""
