"""Takes files, network and processes away from this process, for good: it grades text that a model wrote.

Three layers, none of which needs a privilege: Python refuses (an audit hook), the kernel refuses system calls
(seccomp, on x86-64 and AArch64), and the kernel refuses to read outside the libraries (Landlock, Linux 5.13).
A kernel without the last two leaves the first, which code that is already running in Python can get around.

What stays: memory, the pipe that is open, and reading modules, which sympy imports as it needs them.
"""

import ctypes
import os
import platform
import struct
import sys
import sysconfig
from collections.abc import Iterable
from pathlib import Path

from treepo.rewards.system_calls import DENIED, MISSING, NUMBERS

_PR_SET_NO_NEW_PRIVS = 38
_SECCOMP_SET_MODE_FILTER, _ALL_THREADS = 1, 1
_LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_RESTRICT = 444, 445, 446
_READ_FILE, _READ_DIRECTORY, _ALL_OF_FILES = 1 << 2, 1 << 3, (1 << 13) - 1
_ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_FOREIGN_NUMBERS = 0x40000000  # from here on: x86-64's calls with 32-bit pointers
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_CLONE_THREAD = 0x10000
_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06  # of the kernel's filter language
_ALLOW, _ERRNO = 0x7FFF0000, 0x00050000
_EACCES, _ENOSYS = 13, 38
_REFUSED_EVENTS = frozenset(
    {
        *("os.exec", "os.fork", "os.forkpty", "os.posix_spawn", "os.spawn", "os.system", "os.kill"),
        *("os.killpg", "os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.link", "os.symlink"),
        *("os.truncate", "os.chmod", "os.chown", "os.utime", "os.setxattr", "os.removexattr"),
        *("pty.spawn", "subprocess.Popen"),
    }
)
_REFUSED_PREFIXES = ("socket.", "ctypes.", "shutil.", "tempfile.", "urllib.", "http.", "ftplib.", "mmap.")
_PACKAGES = ("treepo", "sympy", "mpmath", "math_verify", "latex2sympy2_extended", "antlr4")

_LANDLOCK = "Landlock (reading files)"
_SECCOMP = "seccomp (sockets, processes, signals, changing files)"


class RefusedError(PermissionError):
    """What a confined process must not do; the text names it."""


def confine() -> tuple[str, ...]:
    """Confine this process with every layer that the kernel offers. Returns the missing ones."""
    readable = _libraries()
    layers = {_LANDLOCK: _forbid_reading(readable), _SECCOMP: _forbid_system_calls()}
    sys.addaudithook(_Guard(readable))
    return tuple(name for name, holds in layers.items() if not holds)


class _Guard:
    """Python's side. Modules are still found and read."""

    def __init__(self, readable: Iterable[Path]) -> None:
        self._readable = tuple(f"{folder}{os.sep}" for folder in readable)

    def __call__(self, event: str, arguments: tuple[object, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            writes = isinstance(flags, int) and flags & _WRITES
            if writes or (isinstance(path, str | bytes) and not self._is_library(os.fsdecode(path))):
                raise RefusedError(f"open {path!r:.100}")
        elif event in ("os.listdir", "os.scandir"):
            if sys._getframe(1).f_globals.get("__name__") != "importlib._bootstrap_external":
                raise RefusedError(event)
        elif event in _REFUSED_EVENTS or event.startswith(_REFUSED_PREFIXES):
            raise RefusedError(event)

    def _is_library(self, path: str) -> bool:
        return os.path.abspath(path).startswith(self._readable)


def _libraries() -> list[Path]:
    """The folders of Python's and of the grader's modules."""
    paths = sysconfig.get_paths()
    folders = {Path(paths["stdlib"]), Path(paths["platstdlib"])}
    for name in _PACKAGES:
        if name in sys.modules:
            folders.update(map(Path, sys.modules[name].__path__))
    every = folders | {folder.resolve() for folder in folders}
    return sorted(folder for folder in every if folder.is_dir())


def _forbid_reading(readable: Iterable[Path]) -> bool:
    """Have the kernel refuse every file outside the folders. Returns False if it cannot."""
    library = ctypes.CDLL(None, use_errno=True)
    handled = ctypes.create_string_buffer(struct.pack("Q", _ALL_OF_FILES))
    ruleset = library.syscall(_LANDLOCK_CREATE, handled, 8, 0)
    if ruleset < 0:
        return False
    try:
        for folder in readable:
            descriptor = os.open(folder, os.O_PATH | os.O_CLOEXEC)
            rule = ctypes.create_string_buffer(struct.pack("=Qi", _READ_FILE | _READ_DIRECTORY, descriptor))
            done = library.syscall(_LANDLOCK_ADD, ruleset, 1, rule, 0)
            os.close(descriptor)
            if done != 0:
                return False
        library.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
        return library.syscall(_LANDLOCK_RESTRICT, ruleset, 0) == 0
    finally:
        os.close(ruleset)


def _forbid_system_calls() -> bool:
    """Have the kernel refuse sockets, processes, and changes of files. Returns False if it cannot."""
    machine = platform.machine()
    if machine not in NUMBERS:
        return False
    library = ctypes.CDLL(None, use_errno=True)
    program = _program(_ARCHITECTURES[machine], NUMBERS[machine])
    instructions = ctypes.create_string_buffer(b"".join(program), 8 * len(program))
    filter_ = ctypes.create_string_buffer(
        struct.pack("HxxxxxxP", len(program), ctypes.addressof(instructions))
    )
    library.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    number = NUMBERS[machine]["seccomp"]
    return library.syscall(number, _SECCOMP_SET_MODE_FILTER, _ALL_THREADS, filter_) == 0


def _program(architecture: int, numbers: dict[str, int]) -> list[bytes]:
    """The filter: one instruction is code, jump if true, jump if false, operand."""

    def instruction(code: int, operand: int, if_true: int = 0, if_false: int = 0) -> bytes:
        return struct.pack("HBBI", code, if_true, if_false, operand)

    deny, missing = instruction(_RETURN, _ERRNO | _EACCES), instruction(_RETURN, _ERRNO | _ENOSYS)
    load_number = instruction(_LOAD, 0)

    def only(name: str, argument: int, test: bytes) -> list[bytes]:
        """Deny a call unless `test`, of the low half of an argument, jumps over the refusal."""
        load = instruction(_LOAD, 16 + 8 * argument)
        return [instruction(_EQUAL, numbers[name], 0, 4), load, test, deny, load_number]

    reads = instruction(_ANY_BIT, _WRITES, 0, 1)
    program = [instruction(_LOAD, 4), instruction(_EQUAL, architecture, 1, 0), deny, load_number]
    program += [instruction(_AT_LEAST, _FOREIGN_NUMBERS, 0, 1), deny]
    for names, refusal in ((DENIED, deny), (MISSING, missing)):
        for name in names:
            if name in numbers:
                program += [instruction(_EQUAL, numbers[name], 0, 1), refusal]
    program += only("openat", 2, reads)
    if "open" in numbers:
        program += only("open", 1, reads)
    program += only("clone", 0, instruction(_ANY_BIT, _CLONE_THREAD, 1, 0))
    return [*program, instruction(_RETURN, _ALLOW)]
