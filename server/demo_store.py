"""Makes a checkout's own store from its demo store. Knows folders, not what a store holds."""

import logging
import secrets
import shutil
from pathlib import Path

logger = logging.getLogger(__name__)


def seed_store(path: Path, demo: Path) -> bool:
    """A whole copy of `demo` at `path`, unless something is there already. Whether it was made."""
    if path.exists():
        return False
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        shutil.copytree(demo, temporary)
        try:
            temporary.rename(path)  # last, so that nobody sees half a store
        except OSError:
            if path.exists():  # another process was first
                return False
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    logger.info("store seeded path=%s from=%s", path, demo)
    return True
