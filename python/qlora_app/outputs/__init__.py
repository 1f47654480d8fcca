"""Output of commands: atomic, under a lock, and never overwriting files that a command did not write.

``files`` renames and deletes, ``lock`` excludes other processes, ``ownership`` lists the files that our directories may
contain, ``directory`` handles ``--output``, ``waiting`` retains intermediate results.
"""

import sys

if sys.platform == "win32":  # files are locked and flushed with POSIX functions
    raise ImportError(
        "the command qlora-ext needs Linux or macOS; on Windows, run it in the Windows Subsystem for Linux"
    )
