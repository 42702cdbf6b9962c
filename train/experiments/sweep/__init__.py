"""Sweeps: many variations of a fine-tune, trained as few programs over one copy of the base."""
