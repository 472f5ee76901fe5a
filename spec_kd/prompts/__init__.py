"""Where prompts come from: logs, curated sets, or the target itself; all end in the same prompt set.

The public names are those of `spec_kd`; each is imported from its own file, so that reading logs does not load torch.
"""
