"""The audit log: one JSON line per answer, rotated; what goes wrong with it never fails a request."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import IO, Any

from common.cli import UserError, log
from common.run_record import utc_stamp

KEPT_FILES = 5  # path.1 to path.5 beside the current one


class AuditLog:
    """Writes to `path`, which only its owner may read.

    Args:
        max_bytes: at which size the file is put aside for a new one.

    Raises:
        UserError: the file cannot be opened at the start.
    """

    def __init__(self, path: str, max_bytes: int) -> None:
        try:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            self._handler = _Handler(path, max_bytes)
        except OSError as error:
            raise UserError(f"AUDIT_LOG={path} cannot be written ({error.strerror}); choose another path") from error

    @property
    def failures(self) -> int:
        """Lines that could not be written."""
        return self._handler.failures

    def write(self, **facts: Any) -> None:
        """Append one line: the time, then `facts`."""
        stamp = utc_stamp(time.time(), milliseconds=True)
        line = json.dumps({"time": stamp, **facts}, ensure_ascii=False, separators=(",", ":"))
        self._handler.handle(logging.LogRecord("audit", logging.INFO, "", 0, line, None, None))

    def close(self) -> None:
        self._handler.close()


class _Handler(RotatingFileHandler):
    def __init__(self, path: str, max_bytes: int) -> None:
        self.failures = 0
        super().__init__(path, maxBytes=max_bytes, backupCount=KEPT_FILES, encoding="utf-8")

    def _open(self) -> IO[str]:
        def private(path: str, flags: int) -> int:
            return os.open(path, flags, 0o600)

        return open(self.baseFilename, self.mode, encoding=self.encoding, errors="backslashreplace", opener=private)

    def handleError(self, record: logging.LogRecord) -> None:
        self.failures += 1
        if self.failures & (self.failures - 1) == 0:  # the 1st, 2nd, 4th, 8th ...: a full disk must not fill the log
            log(f"audit log {self.baseFilename}: {self.failures} lines could not be written ({sys.exc_info()[1]})")
