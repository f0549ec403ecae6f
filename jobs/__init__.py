"""The jobs. Each module is one step: `python -m jobs.NAME [--config FILE] [group.key=value ...]`."""
