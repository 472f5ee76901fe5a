"""Training on completions that are written while training."""
