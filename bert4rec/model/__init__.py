"""The network, its layers, losses and batches."""
