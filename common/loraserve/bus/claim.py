"""A process's claim to its name on this machine: a private folder and a lock held for as long as it lives."""

import fcntl
import os
import stat
from pathlib import Path
from types import TracebackType

from loraserve.errors import ConfigError


def private_dir(path: Path) -> Path:
    """Makes the folder with mode 0700; refuses one that others own or may enter. Raises ConfigError."""
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = path.lstat()
    except OSError as error:
        raise ConfigError(f"cluster.run_dir {path}: {error.strerror}") from error
    if not stat.S_ISDIR(found.st_mode):
        raise ConfigError(f"cluster.run_dir {path} is not a folder; name another")
    if found.st_uid != os.getuid():
        raise ConfigError(f"cluster.run_dir {path} belongs to user id {found.st_uid}; name a folder of your own")
    if found.st_mode & 0o077:
        raise ConfigError(
            f"cluster.run_dir {path} has mode {stat.S_IMODE(found.st_mode):04o}, so others could talk to the cluster; "
            f"run: chmod 700 {path}"
        )
    return path


class NameClaim:
    """Holds ``<run_dir>/<name>.lock``. The kernel frees it whatever way the process ends."""

    def __init__(self, run_dir: Path, name: str) -> None:
        self._path = private_dir(run_dir) / f"{name}.lock"
        self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.pread(self._descriptor, 32, 0).decode(errors="replace").strip() or "unknown"
            os.close(self._descriptor)
            raise ConfigError(
                f"a process named {name} already runs in {run_dir} (pid {holder}); stop it, or use another --name "
                "or cluster.run_dir"
            ) from error
        os.truncate(self._descriptor, 0)
        os.pwrite(self._descriptor, str(os.getpid()).encode(), 0)

    def release(self) -> None:
        """The file stays: removing it would let two processes hold locks on two files of one name."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> "NameClaim":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.release()
