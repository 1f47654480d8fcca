"""Libraries of an older glibc to link to, from Zig's package on PyPI: every symbol with the version that it had there.

What is linked to them needs no newer glibc, or is not linked at all. They hold names and no code, and no program is
compiled by Zig.
"""

from __future__ import annotations

import os
import pathlib
import shutil
import subprocess
import sys

VERSION = "2.28"  # the one of manylinux_2_28
_MODULES = ("c", "m", "pthread", "dl", "ld")


def make(arch: str, folder: pathlib.Path) -> pathlib.Path:
    """Writes libc.so and libm.so for ``-L folder``; what else a linker asks for is in libc.so, as in newer glibcs."""
    work = folder / "zig"
    work.mkdir(parents=True, exist_ok=True)
    (work / "empty.c").write_text("")
    cache = {f"ZIG_{kind}_CACHE_DIR": str(work / "cache") for kind in ("GLOBAL", "LOCAL")}
    command = [sys.executable, "-m", "ziglang", "cc", "-target", f"{arch}-linux-gnu.{VERSION}", "-shared", "-lm"]
    subprocess.run([*command, "empty.c", "-o", "empty.so"], cwd=work, env={**os.environ, **cache}, check=True)
    [made] = [path.parent for path in (work / "cache").rglob("libc.so.6")]
    names = [next(made.glob(f"lib{module}.so.*")).name for module in _MODULES]
    for name in names:
        shutil.copy(made / name, folder / name)
    [nonshared] = (work / "cache").rglob("libc_nonshared.a")
    shutil.copy(nonshared, folder / nonshared.name)
    libc, libm, *others = names
    (folder / "libc.so").write_text(f"GROUP ( {libc} {nonshared.name} AS_NEEDED ( {' '.join(others)} ) )\n")
    (folder / "libm.so").write_text(f"INPUT ( {libm} )\n")
    shutil.rmtree(work)
    return folder
