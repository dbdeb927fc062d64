"""What a run leaves behind, and how people look at it: run folder, metrics, progress line, report."""
