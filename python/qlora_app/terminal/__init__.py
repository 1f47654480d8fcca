"""Terminal output of commands: progress bars, and the progress of a run."""
