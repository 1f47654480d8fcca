"""The process in which ``sandbox.run`` executes a program that a model wrote. It imports nothing of ours.

It reads a JSON object from standard input: the ``program``, a ``token``, and limits: ``seconds`` of processor time,
``memory`` and ``disk`` in bytes. If the program runs to its end, it writes the token to its standard output, which the
program does not have. It first writes "isolated" or "exposed": whether the kernel let it hide the network and write
protect the file system.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys

try:
    import resource
except ImportError:  # Windows; ``sandbox.run`` rejects it
    resource = None  # type: ignore[assignment]

# Of Linux, from its headers.
_NEW_MOUNTS, _NEW_IPC, _NEW_USER, _NEW_PIDS, _NEW_NETWORK = 0x00020000, 0x08000000, 0x10000000, 0x20000000, 0x40000000
_NO_SUID, _NO_DEVICES, _RECURSIVE, _PRIVATE = 0x2, 0x4, 0x4000, 0x40000
_MOUNT_SETATTR, _AT_CWD, _AT_RECURSIVE, _READ_ONLY = 442, -100, 0x8000, 0x1
_DIE_WITH_PARENT, _NO_NEW_PRIVILEGES = 1, 38
_CAPABILITIES_VERSION = 0x20080522
_IN_SANDBOX = 1000  # the user and group inside, which have no rights outside


def _isolate(disk: int) -> None:
    """Leaves the process without a network, other processes and capabilities.

    It sees the file system write protected, with an empty working directory in memory.

    Raises:
        OSError, AttributeError: the system does not permit this, or is not Linux.
    """
    libc = ctypes.CDLL(None, use_errno=True)

    def call(function: str, *arguments: object) -> None:
        if getattr(libc, function)(*arguments) != 0:
            raise OSError(ctypes.get_errno(), function)

    user, group = os.getuid(), os.getgid()
    call("unshare", _NEW_USER | _NEW_MOUNTS | _NEW_NETWORK | _NEW_IPC | _NEW_PIDS)
    for name, text in (
        ("setgroups", "deny"),
        ("uid_map", f"{_IN_SANDBOX} {user} 1"),
        ("gid_map", f"{_IN_SANDBOX} {group} 1"),
    ):
        descriptor = os.open(f"/proc/self/{name}", os.O_WRONLY)
        os.write(descriptor, text.encode())
        os.close(descriptor)
    call("mount", b"none", b"/", None, ctypes.c_ulong(_RECURSIVE | _PRIVATE), None)
    read_only = (ctypes.c_uint64 * 4)(_READ_ONLY, 0, 0, 0)
    call("syscall", _MOUNT_SETATTR, _AT_CWD, b"/", _AT_RECURSIVE, read_only, ctypes.c_size_t(32))
    here = os.getcwd()
    options = f"size={disk}".encode()
    call("mount", b"tmpfs", here.encode(), b"tmpfs", ctypes.c_ulong(_NO_SUID | _NO_DEVICES), options)
    os.chdir(here)
    child = os.fork()  # the first process of its namespace, with which all others end
    if child:
        os._exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) & 0xFF)
    call("prctl", _DIE_WITH_PARENT, ctypes.c_ulong(signal.SIGKILL), 0, 0, 0)
    call("prctl", _NO_NEW_PRIVILEGES, 1, 0, 0, 0)
    call("capset", (ctypes.c_uint32 * 2)(_CAPABILITIES_VERSION, 0), (ctypes.c_uint32 * 6)())


def _limit(order: dict[str, int]) -> None:
    for name, most in (
        ("RLIMIT_AS", order["memory"]),
        ("RLIMIT_CPU", order["seconds"]),
        ("RLIMIT_FSIZE", order["disk"]),
        ("RLIMIT_NPROC", 0),
        ("RLIMIT_CORE", 0),
    ):
        if hasattr(resource, name):
            resource.setrlimit(getattr(resource, name), (most, most))


def main() -> None:
    order = json.load(sys.stdin)
    verdict = os.dup(1)
    nothing = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(nothing, descriptor)
    try:
        _isolate(order["disk"])
        os.write(verdict, b"isolated\n")
    except (OSError, AttributeError):
        os.write(verdict, b"exposed\n")
    _limit(order)
    token = order.pop("token")
    exec(compile(order["program"], "program", "exec"), {"__name__": "__main__"})
    os.write(verdict, token.encode())
    os._exit(0)


if __name__ == "__main__":
    main()
