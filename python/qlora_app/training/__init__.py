"""A fine-tuning run: its settings, the phases of the recipe, the trainer and its checkpoints."""
