"""What the disk could not do, in the words of the registration that asked for it."""

import errno
import sqlite3

from loraserve.errors import AdapterError

# A file-size limit (EFBIG) and a quota end a write in the same way as a full disk does, and need the same remedy.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def storage_error(error: OSError | sqlite3.Error, what: str) -> AdapterError:
    """``disk_full`` where there is no room, else ``storage``."""
    if isinstance(error, sqlite3.Error):
        full = getattr(error, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_FULL
    else:
        full = error.errno in _FULL
    if full:
        return AdapterError("disk_full", f"no room to store {what}: free space under cluster.data_dir and try again")
    return AdapterError("storage", f"{what} could not be stored or read: {error}; see the store's log and the disk")
