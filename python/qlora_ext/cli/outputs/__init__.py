"""What a command writes: complete or absent, under a lock, and never over anything that is not its own.

``files`` places and deletes, ``lock`` keeps other processes out, ``ownership`` knows what a directory of ours may hold,
``directory`` is what ``--output`` names, ``waiting`` retains intermediate results.
"""
