"""``qlora-ext export``: the targets, what each of them rejects before anything is written, and how it is written."""
