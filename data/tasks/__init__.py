"""Tasks: what a fine-tune is judged on. Training, validation and test rows, and a score."""
