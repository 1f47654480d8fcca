"""What a command shows while it works: bars, and the progress of a run."""
