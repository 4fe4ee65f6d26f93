"""One private folder for all temporary files of a command, or of an engine inside one.

    with temporary_folder() as folder:  # /tmp/treepo-k3v9x0qe, mode 0700
        ...  # it is TMPDIR of this process and of all that it starts

The folder is made in RAY_TMPDIR, else TMPDIR, else /tmp, and removed at the end. A lock in it, which the
kernel frees when its holder ends, tells a later start that its command was killed: such folders of this user
are removed at every start and end. Shared memory has no folder, so its name has the folder's, with which it
is removed.
"""

import fcntl
import json
import logging
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict
from multiprocessing import process
from pathlib import Path

from treepo.data.folder_lock import Holder
from treepo.errors import ConfigError

PREFIX = "treepo-"
_LOCK = ".temporary"  # another name than a run folder's lock has
_LONGEST_SOCKET = 107  # bytes in the path of a unix socket
_NAME = len(PREFIX) + 8
_SHARED_MEMORY = Path("/dev/shm")
_DEFAULT = "/tmp"
_VARIABLES = ("RAY_TMPDIR", "TMPDIR")
_COMPILED = {  # variable: its folder in the cache
    "TORCHINDUCTOR_CACHE_DIR": "torchinductor",
    "CUTE_DSL_CACHE_DIR": "cute_dsl",
    "FLASH_ATTENTION_CUTE_DSL_CACHE_DIR": "flash_attention",
}
_MAKE_SECONDS = 60.0  # to make a folder and write into its lock
_TRIES, _RETRY_SECONDS = 20, 0.1  # for processes that are ending and still write
_log = logging.getLogger(__name__)


class TemporaryFolder:
    """path: the folder, which exists until `close`.

    room: bytes that the longest path of a socket below it needs, with its slash. Raises ConfigError if no
    folder can be made, or RAY_TMPDIR is too long for one.
    """

    def __init__(self, room: int = 0) -> None:
        base = _base(room)
        remove_abandoned(base)
        self.path, self._lock = _make(base)
        self._closed = False

    @contextmanager
    def used(self) -> Iterator[None]:
        """While the body runs, put temporary files of this process and of its new children into the folder.

        Compiled kernels stay out of it.
        """
        environment = os.environ.get("TMPDIR")
        config = process.current_process()._config  # type: ignore[reportAttributeAccessIssue]  # of a child too
        before, prefix = tempfile.tempdir, config["semprefix"]
        os.environ["TMPDIR"] = str(self.path)
        keep_compiled_code()
        tempfile.tempdir = None  # read the environment again
        config["semprefix"] = f"/{self.path.name}"
        try:
            yield
        finally:
            tempfile.tempdir, config["semprefix"] = before, prefix
            if environment is None:
                del os.environ["TMPDIR"]
            else:
                os.environ["TMPDIR"] = environment

    def close(self) -> None:
        """Remove the folder and the shared memory that has its name, and what killed commands have left. May
        be called again.
        """
        if self._closed:
            return
        self._closed = True
        _remove(self.path)
        os.close(self._lock)
        remove_abandoned(self.path.parent)


def keep_compiled_code() -> None:
    """Keep the kernels that this process and its children compile in the user's cache.

    By default they are among the temporary files, in folders of known names that somebody else may have made
    first. The user's own variables stay.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "treepo"
    try:
        cache.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        told = "compiled kernels are not kept (XDG_CACHE_HOME names another folder)"
        _log.warning("%s: %s: %s", error.filename, error.strerror, told)
        return
    for name, folder in _COMPILED.items():
        os.environ.setdefault(name, str(cache / folder))


@contextmanager
def temporary_folder(room: int = 0) -> Iterator[Path]:
    """Use a `TemporaryFolder` while the body runs, then remove it."""
    folder = TemporaryFolder(room)
    try:
        with folder.used():
            yield folder.path
    finally:
        folder.close()


def remove_abandoned(base: Path) -> None:
    """Remove the folders in `base` whose command is dead, of this user only."""
    for folder in base.glob(f"{PREFIX}*"):
        with suppress(OSError):  # it is no folder of ours, or another start removes it at this moment
            if not _is_ours(folder):
                continue
            lock = os.open(folder / _LOCK, os.O_RDWR | os.O_NOFOLLOW)
            try:
                if _is_abandoned(lock):
                    _log.info("%s was left by a command that was killed; it is removed", folder)
                    _remove(folder)
            finally:
                os.close(lock)


def _base(room: int) -> Path:
    """The folder in which to make another. Raises ConfigError if it is unusable."""
    longest = _LONGEST_SOCKET - room - _NAME - 1
    inside = Path(os.environ.get("TMPDIR", "")).name.startswith(PREFIX)  # a folder of this kind
    variables = reversed(_VARIABLES) if inside else _VARIABLES
    variable = next((name for name in variables if os.environ.get(name)), None)
    base = os.path.abspath(os.environ[variable]) if variable else _DEFAULT
    if len(os.fsencode(base)) > longest:
        told = f"{variable}={base}: too long for the sockets below it; at most {longest} bytes are possible"
        if variable == "RAY_TMPDIR":
            raise ConfigError(told)
        _log.warning("%s, so temporary files are in %s (RAY_TMPDIR chooses another folder)", told, _DEFAULT)
        base = _DEFAULT
    return Path(base)


def _make(base: Path) -> tuple[Path, int]:
    """A new folder, and the descriptor that holds its lock. Raises ConfigError."""
    with ExitStack() as undo:
        try:
            folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=base))
            undo.callback(shutil.rmtree, folder, ignore_errors=True)
            lock = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
            undo.callback(os.close, lock)
            with suppress(OSError):  # a file system without locks: the text alone decides
                fcntl.flock(lock, fcntl.LOCK_EX)
            # Without its text the lock is nobody's, so that no other start takes the folder for abandoned.
            os.pwrite(lock, json.dumps(asdict(Holder.this())).encode() + b"\n", 0)
        except OSError as error:
            where = " or ".join(_VARIABLES)
            raise ConfigError(
                f"{base}: no folder for temporary files can be made: {error.strerror}; {where} names another"
            ) from None
        undo.pop_all()
    return folder, lock


def _is_ours(folder: Path) -> bool:
    """Whether it is a private folder of this user, by its name and mode."""
    state = os.lstat(folder)
    private = stat.S_ISDIR(state.st_mode) and stat.S_IMODE(state.st_mode) == 0o700
    return private and state.st_uid == os.getuid() and len(folder.name) == _NAME


def _is_abandoned(lock: int) -> bool:
    """Whether the holder of the lock is dead; takes the lock if it is.

    A folder whose lock has no text is being made, or its command was killed meanwhile: its age decides.
    """
    holder = Holder.of_text(os.pread(lock, 4096, 0))
    if holder is None and time.time() - os.fstat(lock).st_mtime < _MAKE_SECONDS:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return holder is not None and holder.here and not holder.alive
    return True


def _remove(folder: Path) -> None:
    """Remove the folder, those of dead engines inside it, and their shared memory."""
    for name in [folder.name, *(inner.name for inner in folder.rglob(f"{PREFIX}*") if inner.is_dir())]:
        for memory in _SHARED_MEMORY.glob(f"*{name}*"):
            with suppress(FileNotFoundError):
                memory.unlink()
    for _ in range(_TRIES):
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            return
        time.sleep(_RETRY_SECONDS)
    _log.warning("%s cannot be removed whole", folder)
