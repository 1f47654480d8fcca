"""The text that a model writes: an answer to a prompt, and a conversation."""
