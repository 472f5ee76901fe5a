"""How the next token is chosen: options, logits processors, draws."""
