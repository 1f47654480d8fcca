"""Writes GGUF files: models, LoRA adapters, and copies of files with other weights. ``qlora_ext.gguf`` reads them."""

# The names of the embeddings and the output head.
TABLES = ("token_embd.weight", "output.weight")
