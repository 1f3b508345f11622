"""A process's file operations, seen and answered one by one before they are carried out.

The kernel hands the calls of all threads and languages to a supervisor (seccomp's user
notification; Linux 5.5 or newer, no privileges): Python's own, those of C++ and Rust, and those
made by number. A process that is killed at a call leaves its files exactly as they were before it.
"""

import ctypes
import fcntl
import os
import platform
import re
import select
import signal
import struct
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

# Call -> its numbers on x86-64 and aarch64, and its arguments: a file's descriptor, or (folder's
# descriptor, path).
CALLS: dict[str, tuple[int, int | None, tuple]] = {
    "write": (1, 64, (0,)),
    "pwrite64": (18, 68, (0,)),
    "writev": (20, 66, (0,)),
    "pwritev": (296, 70, (0,)),
    "sendfile": (40, 71, (0,)),
    "copy_file_range": (326, 285, (2,)),
    "ftruncate": (77, 46, (0,)),
    "fallocate": (285, 47, (0,)),
    "fsync": (74, 82, (0,)),
    "fdatasync": (75, 83, (0,)),
    "fchmod": (91, 52, (0,)),
    "open": (2, None, ((None, 0),)),
    "openat": (257, 56, ((0, 1),)),
    "creat": (85, None, ((None, 0),)),
    "truncate": (76, 45, ((None, 0),)),
    "mkdir": (83, None, ((None, 0),)),
    "mkdirat": (258, 34, ((0, 1),)),
    "rmdir": (84, None, ((None, 0),)),
    "unlink": (87, None, ((None, 0),)),
    "unlinkat": (263, 35, ((0, 1),)),
    "rename": (82, None, ((None, 0), (None, 1))),
    "renameat": (264, 38, ((0, 1), (2, 3))),
    "renameat2": (316, 276, ((0, 1), (2, 3))),
    "link": (86, None, ((None, 0), (None, 1))),
    "linkat": (265, 37, ((0, 1), (2, 3))),
    "symlink": (88, None, ((None, 1),)),
    "symlinkat": (266, 36, ((1, 2),)),
    "chmod": (90, None, ((None, 0),)),
    "fchmodat": (268, 53, ((0, 1),)),
    "utimensat": (280, 88, ((0, 1),)),
}
MACHINE = (
    {"x86_64": 0, "aarch64": 1}.get(platform.machine()) if platform.system() == "Linux" else None
)
NUMBERS = (
    {}
    if MACHINE is None
    else {CALLS[name][MACHINE]: name for name in CALLS if CALLS[name][MACHINE] is not None}
)
GROWING = {
    "write",
    "pwrite64",
    "writev",
    "pwritev",
    "sendfile",
    "copy_file_range",
    "ftruncate",
    "fallocate",
    "mkdir",
}
GROWING |= {"mkdirat", "link", "linkat", "symlink", "symlinkat"}
"""Calls that need room, beside those that make a file."""
IDLE = {"read", "fsync", "fdatasync"}
"""Calls that change no file."""
RANDOM = re.compile(r"[0-9a-f]{16,}|(?<=[._-])[a-z0-9_]{8}(?=\.partial)|\d{7,}")
"""What differs in names from run to run."""
NR_SECCOMP, NEW_LISTENER, NO_NEW_PRIVS = (317, 277)[MACHINE or 0], 8, 38
RECEIVE, SEND, GO_ON = 0xC0502100, 0xC0182101, 1


class Operation(NamedTuple):
    """A call on a file.

    Attributes:
        call: its name; "read" where a file or folder is opened to read.
        where: the file's path or paths in the folder that is watched, random parts masked.
        times: how often the process has done so, this one included.
        paths: as they are.
        grows: whether a full disk would refuse it.
    """

    call: str
    where: str
    times: int
    paths: tuple[str, ...]
    grows: bool

    def __str__(self) -> str:
        return f"{self.call} {self.where} #{self.times}"

    @property
    def changes(self) -> bool:
        """Whether it changes files."""
        return self.call not in IDLE


Answer = Callable[[Operation], int | None]
"""What becomes of an operation: None, it is carried out; a positive number, it ends with that
error; the negative number of a signal, the process gets that, before the operation where it is
SIGKILL and just after it otherwise."""


def available() -> str:
    """Why operations cannot be watched here; "" where they can."""
    if MACHINE is None:
        return "file operations are watched on Linux only, on x86-64 and aarch64"
    tried = subprocess.run([sys.executable, __file__], capture_output=True)  # nothing undoes it
    return "the system lets nobody watch file operations" if tried.returncode else ""


def install() -> int:
    """Has a supervisor answer all file operations of this process from now on; returns the
    descriptor for that."""

    class Instruction(ctypes.Structure):
        _fields_ = [
            ("code", ctypes.c_ushort),
            ("jt", ctypes.c_ubyte),
            ("jf", ctypes.c_ubyte),
            ("k", ctypes.c_uint),
        ]

    class Program(ctypes.Structure):
        _fields_ = [("length", ctypes.c_ushort), ("instructions", ctypes.POINTER(Instruction))]

    load, equal, give, ask, allow = 0x20, 0x15, 0x06, 0x7FC00000, 0x7FFF0000
    numbers = list(NUMBERS)
    code = [
        (load, 0, 0, 0),
        *((equal, len(numbers) - i, 0, number) for i, number in enumerate(numbers)),
    ]
    code += [(give, 0, 0, allow), (give, 0, 0, ask)]
    program = Program(len(code), (Instruction * len(code))(*(Instruction(*one) for one in code)))
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(NO_NEW_PRIVS, 1, 0, 0, 0)
    descriptor = libc.syscall(NR_SECCOMP, 1, NEW_LISTENER, ctypes.byref(program))
    if descriptor < 0:
        raise OSError(ctypes.get_errno(), "seccomp")
    return descriptor


def supervise(main: int, listener: int, folder: Path, answer: Answer) -> None:
    """Answers the operations of a process and its children until all have ended.

    Args:
        main: the process.
        listener: of `install`, in that process.
        folder: all else is carried out without a question.
        answer: is asked about each operation in the folder.
    """
    seen: Counter[str] = Counter()
    poll = select.poll()
    poll.register(listener, select.POLLIN)
    while True:
        if not any(event & select.POLLIN for _, event in poll.poll()):
            return  # POLLHUP: nobody is left
        notice = bytearray(80)
        try:
            fcntl.ioctl(listener, RECEIVE, notice)
        except OSError:  # killed meanwhile
            continue
        cookie, pid, _, number, _, _, *arguments = struct.unpack("QIIiIQ6Q", notice)
        given = 0
        try:
            if operation := _operation(pid, NUMBERS[number], arguments, folder, seen):
                given = answer(operation) or 0
            if given == -signal.SIGKILL:
                os.kill(main, signal.SIGKILL)
                continue
            fcntl.ioctl(
                listener,
                SEND,
                struct.pack("Qqii", cookie, 0, -max(given, 0), 0 if given > 0 else GO_ON),
            )
            if given < 0:
                os.kill(main, -given)
        except (FileNotFoundError, ProcessLookupError):  # it has ended meanwhile
            continue


def _operation(
    pid: int, call: str, arguments: list[int], folder: Path, seen: Counter[str]
) -> Operation | None:
    paths = [_path(pid, arguments, which) for which in CALLS[call][2]]
    inside = [path for path in paths if Path(path).is_relative_to(folder)]
    if not inside:
        return None
    grows = call in GROWING
    if call in ("open", "openat"):
        flags = arguments[1 if call == "open" else 2]
        if not flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC):
            call = "read"
        grows = bool(flags & os.O_CREAT) and not os.path.lexists(paths[0])
    where = " -> ".join(RANDOM.sub("*", os.path.relpath(path, folder)) for path in paths)
    seen[f"{call} {where}"] += 1
    return Operation(call, where, seen[f"{call} {where}"], tuple(paths), grows)


def _path(pid: int, arguments: list[int], which: int | tuple[int | None, int]) -> str:
    if isinstance(which, int):
        return os.readlink(f"/proc/{pid}/fd/{arguments[which] & 0xFFFFFFFF}")
    folder, path = which
    name = os.fsdecode(_text(pid, arguments[path]))
    descriptor = -1 if folder is None else ctypes.c_int(arguments[folder] & 0xFFFFFFFF).value
    base = os.readlink(f"/proc/{pid}/cwd" if descriptor < 0 else f"/proc/{pid}/fd/{descriptor}")
    return os.path.normpath(os.path.join(base, name))


def _text(pid: int, address: int) -> bytes:
    """A text of C's in a process's memory, read page by page."""
    text = b""
    with open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
        while b"\0" not in text and len(text) < 2**16:
            start = address + len(text)
            text += os.pread(memory.fileno(), 4096 - start % 4096, start)
    return text.partition(b"\0")[0]


if __name__ == "__main__":
    install()
