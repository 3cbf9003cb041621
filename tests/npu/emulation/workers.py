"""Plugin of pytest: the processes of pytest-xdist are on the emulated NPU, as launch.py is, which starts them."""

import os

from emulation import device

LIBRARIES = device.install() if "PYTEST_XDIST_WORKER" in os.environ else ()  # kept: overrides last as long as these
