"""Output of commands: atomic, under a lock, and never overwriting files that a command did not write.

``files`` renames and deletes, ``lock`` excludes other processes, ``ownership`` lists the files that our directories may
contain, ``directory`` handles ``--output``, ``waiting`` retains intermediate results.
"""
