"""torch_npu's profiler on the emulated device: kernel_details.csv from the log, without times."""

import csv
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from types import TracebackType

COLUMNS = ("Name", "Type", "Accelerator Core", "Duration(us)")  # of those that the real one writes, what we read


class ProfilerActivity(Enum):
    """Stands for torch_npu.profiler.ProfilerActivity."""

    CPU = 0
    NPU = 1


def tensorboard_trace_handler(folder: str) -> Path:
    """Return where the table will be written."""
    return Path(folder)


class profile:  # noqa: N801 - torch_npu's name
    """Stands for torch_npu.profiler.profile, as far as it writes kernel_details.csv."""

    def __init__(self, activities: list[ProfilerActivity], on_trace_ready: Path) -> None:
        from emulation import device

        self._folder, self._recording = on_trace_ready, device.log.recording
        self._leave: Callable[..., object]

    def __enter__(self) -> None:
        context = self._recording()
        self._log, self._leave = context.__enter__(), context.__exit__

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._leave(kind, error, trace)
        from emulation import device

        log = self._log
        assert isinstance(log, device.Log)
        slow = {name.partition(" ")[0] for name in log.on_aicpu}
        with (self._folder / "kernel_details.csv").open("w", newline="") as file:
            table = csv.writer(file)
            table.writerow(COLUMNS)
            for name in (*(name for name, _ in log.launches), *log.replayed):
                table.writerow((name, name, "AI_CPU" if name.partition(".")[0] in slow else "AI_CORE", 0))
