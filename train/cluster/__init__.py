"""Several processes and their end: how they meet, barriers, and signals."""
