"""Records a run and shows it: run folder, metrics, events, progress line, report."""
