"""A fine-tuning run: its settings, the adapter, transformers' Trainer, and checkpoints to go on from."""
