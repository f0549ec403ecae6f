"""From histories to top-k: ranking, batch scoring, a few users, exported programs."""
