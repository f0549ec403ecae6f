"""Speed measurements: ours and the peers, in the same call and on the same data."""
