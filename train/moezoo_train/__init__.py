"""moezoo_train: training moezoo's language models with Lightning.

Lightning takes seconds to import, so the parts are imported from their modules, such as
``moezoo_train.run.module``, ``moezoo_train.data.datamodule`` and ``moezoo_train.run.cli``.
"""
