"""Measures how much memory a device has left. Knows the operating system's files; decides nothing."""

from pathlib import Path

import torch

MEMINFO = Path("/proc/meminfo")
CGROUP = Path("/sys/fs/cgroup")
# Limit, use, and the name in memory.stat of the part of the use that the kernel gives back when it is asked for.
CGROUP_FILES = (
    ("memory.max", "memory.current", "memory.stat", "inactive_file"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "total_inactive_file"),
)
NO_LIMIT = 2**63  # more than any machine has


def available_memory_bytes(device: torch.device) -> int:
    """Free bytes of a CUDA device; else what the machine, or the container's limit, still has."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return min(_machine_bytes(), container_bytes(CGROUP))


def container_bytes(cgroup: Path) -> int:
    """What a limit of this control group, of either version, still leaves; NO_LIMIT if there is none."""
    for limit, used, stat, reclaimable in CGROUP_FILES:
        if (cgroup / limit).is_file() and (text := (cgroup / limit).read_text().strip()) != "max":
            cached_bytes = _stat_bytes(cgroup / stat, reclaimable)
            return max(0, int(text) - int((cgroup / used).read_text()) + cached_bytes)
    return NO_LIMIT


def _machine_bytes() -> int:
    for line in MEMINFO.read_text().splitlines():
        name, _, amount = line.partition(":")
        if name == "MemAvailable":
            return int(amount.split()[0]) * 1024
    raise RuntimeError(f"{MEMINFO} has no MemAvailable")


def _stat_bytes(stat: Path, name: str) -> int:
    """Page cache, such as the base's own file leaves, counts as used but makes room at once."""
    entries = (line.partition(" ") for line in stat.read_text().splitlines())
    return next((int(amount) for key, _, amount in entries if key == name), 0)
