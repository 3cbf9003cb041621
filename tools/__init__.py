"""What people use around the runtime: benches, checks, synthetic checkpoints."""

import covo_npu.kernels  # noqa: F401 - before torch: see there
