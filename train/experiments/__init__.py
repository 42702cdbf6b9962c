"""Many small variations of a fine-tune on one base, and what they say: sweeps."""
