"""What `ray job submit` runs: each module is one step, `python -m jobs.NAME [--config FILE] [group.key=value ...]`."""
