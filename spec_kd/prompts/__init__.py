"""Prompts from logs, from curated datasets, or from the target itself; all end in the same kind of prompt set.

The public names are those of `spec_kd`. Each is imported from its own file, so that reading logs does not load torch.
"""
