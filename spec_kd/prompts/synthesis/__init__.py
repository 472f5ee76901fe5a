"""Lets the target write prompts of its own domain."""
