"""Training on Ray Train, and what a run leaves behind."""
