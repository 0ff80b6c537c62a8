"""Training checkpoints.

``files`` writes and reads them, ``identity`` compares them with the run that resumes, ``finite``
keeps out what is not finite, ``export`` turns one into a model directory.
"""
