"""Says what a disk refuses in the store's own words. Knows error numbers, not what was to be written."""

import errno
import logging
from collections.abc import Iterator
from contextlib import contextmanager

from server.metrics import ServerMetrics
from stack_store.errors import DiskFailed, DiskFull

logger = logging.getLogger(__name__)

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def disk_faults(metrics: ServerMetrics) -> Iterator[None]:
    """An OSError of the block is counted, logged, and raised as DiskFull or DiskFailed: the caller may try again."""
    try:
        yield
    except OSError as error:
        is_full = error.errno in FULL
        metrics.disk_faults.labels("full" if is_full else "failed").inc()
        logger.error("store not changed reason=%r path=%s", error.strerror, error.filename)
        if is_full:
            raise DiskFull("the disk of the store is full; nothing was changed") from error
        reason = error.strerror or type(error).__name__
        raise DiskFailed(f"the disk of the store cannot be read or written ({reason}); nothing was changed") from error
