"""What a run runs on: processes, optimizer, schedule, row order, checkpoints, log, the run folder."""
