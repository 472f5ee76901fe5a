"""What every generation shares: its options, checks of its input, logits processors, drawing, batches of prompts."""
