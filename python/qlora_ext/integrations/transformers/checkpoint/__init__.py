"""4-bit weights of checkpoints in the formats of ``qlora_ext.checkpoints``, for models that transformers loads."""
