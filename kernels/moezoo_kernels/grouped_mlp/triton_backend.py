"""``grouped_mlp`` in whole-batch stages, all of them in Triton.

For GPUs where torch has no fused ``grouped_mm``, and for dtypes it does not take. No copy of the
gathered tokens or of their gradients exists: the products read rows where they are.
"""

from __future__ import annotations

from functools import partial

from moezoo_kernels.grouped_mlp import grouped_mm
from moezoo_kernels.grouped_mlp.triton_stages import STAGES
from moezoo_kernels.triton_support import on_its_device

forward = on_its_device(partial(grouped_mm.forward, stages=STAGES))
backward = on_its_device(partial(grouped_mm.backward, stages=STAGES))
