"""What a job takes of the cluster, and how work is spread over it."""
