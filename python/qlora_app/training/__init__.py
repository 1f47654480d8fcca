"""A fine-tuning run: its settings, its phases, the trainer and its checkpoints."""
