"""The converter: a source checkpoint in, npu_ckpt out. The only place that knows upstream's names."""

import covo_npu.kernels  # before torch: see there
