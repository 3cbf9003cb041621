"""Hardware side of the house: tensors in, tensors out; no model names, no files."""

import os

# PyTorch would import an installed torch_npu on its own and fail with it where CANN is missing, even for work on the
# CPU. npu.py imports it by name. Has no effect on a process that has imported torch already.
os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")
