"""The commands of ``qlora-ext``, a file each: its options (``add_parser``) and what it does (``run``)."""
