"""Modules that experiments share.

``short_run`` trains without a run directory, ``records`` keeps finished runs, ``statistics`` and
``verdict`` judge differences paired by seed, ``report`` and ``picture`` write them down.
"""
