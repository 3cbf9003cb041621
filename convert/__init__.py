"""The converter: a source checkpoint in, npu_ckpt out. The only place that knows upstream's names."""

import covo_npu.kernels  # noqa: F401 - before torch: see there
