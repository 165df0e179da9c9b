"""Keeps the prompts that no domain covers, for whoever decides what to train next. Knows one file, no router.

The file is the only place where a prompt is written. It is a line of JSON a prompt, made readable for the server's own
user alone, and never larger than its limit: what would not fit begins a new file, and the one before is kept beside it.
"""

import json
import logging
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

from server.errors import ConfigInvalid

logger = logging.getLogger(__name__)

OLDER_SUFFIX = ".1"
OWNER_ONLY = 0o600


class GapLog:
    """Appends lines in a thread of its own, so that neither the event loop nor an answer waits for the disk."""

    # Not logging's RotatingFileHandler: a write that fails makes it print the record, prompt and all.

    def __init__(self, path: Path, *, max_bytes: int) -> None:
        """Raises ConfigInvalid if the file cannot be written."""
        self._path, self._max_bytes = path, max_bytes
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="gap-log")
        try:
            self._write(b"")
        except OSError as error:
            raise ConfigInvalid(f"server.gap_log: {str(path)!r} cannot be written: {error}") from error

    def keep(self, prompt: str, scores: Mapping[str, float]) -> "Future[None]":
        """Returns at once; the line is written soon. A fault of the disk is logged, without the prompt."""
        now = datetime.now(UTC).isoformat(timespec="seconds")
        return self._writer.submit(self._append, {"time": now, "prompt": prompt, "scores": dict(scores)})

    def close(self) -> None:
        """Returns when everything is written. Idempotent."""
        self._writer.shutdown()

    def _append(self, entry: Mapping[str, object]) -> None:
        line = json.dumps(entry).encode() + b"\n"  # ASCII: a lone surrogate in a prompt has no UTF-8
        if len(line) > self._max_bytes:
            logger.warning("gap prompt not kept bytes=%d gap_log_bytes=%d", len(line), self._max_bytes)
            return
        try:
            if self._path.exists() and self._path.stat().st_size + len(line) > self._max_bytes:
                self._path.replace(self._path.with_name(self._path.name + OLDER_SUFFIX))
            self._write(line)
        except OSError as error:
            logger.warning("gap prompt not kept path=%s error=%s", self._path, error)

    def _write(self, content: bytes) -> None:
        self._path.touch(OWNER_ONLY)
        with self._path.open("ab") as file:
            file.write(content)
