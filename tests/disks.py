"""Makes the disk take no more than a test wants: the kernel refuses what would make a file longer."""

import resource
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def full_disk(*, max_file_bytes: int) -> Iterator[None]:
    """For every file that this process writes within the block."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (max_file_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
