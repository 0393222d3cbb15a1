"""How much memory can still be had."""

import pytest
import torch

from vla2cli import memory

CPU = torch.device("cpu")
GB = 10**9


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Give a machine of 64 GB memory whose process is in the cgroup `/box/job`; write its files."""
    monkeypatch.setattr(memory, "PROC", tmp_path / "proc")
    monkeypatch.setattr(memory, "CGROUPS", tmp_path / "cgroup")

    def write(name, text):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)

    write("proc/meminfo", "MemTotal:       99999999 kB\nMemAvailable:   62500000 kB\n")
    write("proc/self/cgroup", "4:memory:/old\n0::/box/job\n")
    return write


def limit(write, group, most, current, inactive_file=0):
    write(f"{group}/memory.max", f"{most}\n")
    write(f"{group}/memory.current", f"{current}\n")
    write(f"{group}/memory.stat", f"anon 7\ninactive_file {inactive_file}\nactive_file 9\n")


def test_machine_without_limits_has_what_the_kernel_says(machine):
    assert memory.free_bytes(CPU) == 64 * GB
    limit(machine, "cgroup/box/job", "max", 3 * GB)
    limit(machine, "cgroup/box", 200 * GB, 3 * GB)
    assert memory.free_bytes(CPU) == 64 * GB


def test_limit_of_the_group_or_of_one_around_it_is_what_can_be_had(machine):
    limit(machine, "cgroup/box/job", 8 * GB, 3 * GB)
    assert memory.free_bytes(CPU) == 5 * GB
    limit(machine, "cgroup/box", 6 * GB, 5 * GB)
    assert memory.free_bytes(CPU) == GB
    limit(machine, "cgroup/box", 6 * GB, 7 * GB)
    assert memory.free_bytes(CPU) == 0


def test_pages_of_files_that_rest_can_be_had(machine):
    limit(machine, "cgroup/box/job", 8 * GB, 8 * GB, inactive_file=2 * GB)
    assert memory.free_bytes(CPU) == 2 * GB


def test_limit_at_the_root_is_that_of_a_container(machine):
    machine("proc/self/cgroup", "0::/\n")
    limit(machine, "cgroup", 4 * GB, GB)
    assert memory.free_bytes(CPU) == 3 * GB
