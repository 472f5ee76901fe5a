"""Responses of the target: from prompts to a distillation dataset with exact ids, and on to training rows."""
