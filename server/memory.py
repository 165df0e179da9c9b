"""Measures how much memory a device has left. Knows the operating system's files; decides nothing."""

from pathlib import Path

import torch

MEMINFO = Path("/proc/meminfo")
CGROUP = Path("/sys/fs/cgroup")


def available_memory_bytes(device: torch.device) -> int:
    """Free bytes of a CUDA device; else what the machine, or the container's limit, still has."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return min(_machine_bytes(), _container_bytes())


def _machine_bytes() -> int:
    for line in MEMINFO.read_text().splitlines():
        name, _, amount = line.partition(":")
        if name == "MemAvailable":
            return int(amount.split()[0]) * 1024
    raise RuntimeError(f"{MEMINFO} has no MemAvailable")


def _container_bytes() -> int:
    """Without a limit, more than any machine has."""
    limit, used = CGROUP / "memory.max", CGROUP / "memory.current"
    if not limit.is_file() or (text := limit.read_text().strip()) == "max":
        return 2**63
    return max(0, int(text) - int(used.read_text()))
