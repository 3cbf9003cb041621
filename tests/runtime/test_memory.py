"""How much memory there is: /proc/meminfo, and the limits of cgroups in both versions."""

import pytest

from covo_npu.runtime.checkpoint import memory

MIB = 2**20


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Return a function: files by their place under the root of the groups, and /proc/self/cgroup -> MiB available."""
    monkeypatch.setattr(memory, "MEMORY_INFO", tmp_path / "meminfo")
    monkeypatch.setattr(memory, "OWN_GROUPS", tmp_path / "own")
    monkeypatch.setattr(memory, "GROUPS", tmp_path / "groups")
    (tmp_path / "meminfo").write_text("MemTotal: 9000000 kB\nMemAvailable: 1024000 kB\n")

    def available(files, own="0::/\n"):
        (tmp_path / "own").write_text(own)
        for name, text in files.items():
            (tmp_path / "groups" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "groups" / name).write_text(text)
        return memory.available_memory_bytes() / MIB

    return available


def group(folder, limit, used, inactive=0):
    return {
        f"{folder}memory.max": f"{limit}\n", f"{folder}memory.current": f"{used * MIB}\n",
        f"{folder}memory.stat": f"anon 1\ninactive_file {inactive * MIB}\n",
    }  # fmt: skip


def test_without_groups_it_is_what_the_machine_has(machine):
    assert machine({}) == 1000


@pytest.mark.parametrize(
    ("files", "own", "available"),
    [
        (group("", 300 * MIB, 100), "0::/\n", 200),  # as a container sees its own
        (group("", 300 * MIB, 280, 150), "0::/\n", 170),  # cached files count as free
        (group("", "max", 100), "0::/\n", 1000),
        (group("", 300 * MIB, 400), "0::/\n", 0),
        (group("a/b/", "max", 1) | group("a/", 500 * MIB, 100), "0::/a/b\n", 400),  # the limit of one around it
        (group("a/b/", 50 * MIB, 1) | group("a/", 500 * MIB, 100), "0::/a/b\n", 49),
        (group("c/", 5 * MIB, 1), "0::/a/b\n", 1000),  # somebody else's
    ],
)
def test_limits_of_version_2(machine, files, own, available):
    assert machine(files, own) == available


@pytest.mark.parametrize("own", ["5:memory:/docker/x\n", "5:memory:/\n1:cpu,cpuacct:/y\n"])
def test_limits_of_version_1(machine, own):
    files = {
        "memory/memory.limit_in_bytes": str(300 * MIB), "memory/memory.usage_in_bytes": str(100 * MIB),
        "memory/memory.stat": f"inactive_file 5\ntotal_inactive_file {20 * MIB}\n",
    }  # fmt: skip
    assert machine(files, own) == 220
    assert machine({"memory/memory.limit_in_bytes": str(2**63 - 4096)}, own) == 1000
