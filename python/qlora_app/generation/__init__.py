"""Text generation: the completion of a prompt, and conversations."""
