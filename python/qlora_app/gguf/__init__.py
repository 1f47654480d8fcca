"""Writes GGUF files: models, LoRA adapters, and copies of files with other weights. ``qlora_ext.gguf`` reads them."""
