"""Private names of other libraries that moezoo_models uses, one module per library.

A release that moves a private name breaks one function here. Each says which release it was
written for, why no public name does, and what fails without it. Names that a library asks
subclasses to define (``_init_weights``, ``_no_split_modules``, ``_supports_sdpa``) stand in those
classes.
"""
