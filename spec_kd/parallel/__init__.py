"""Parallel drafts (PARD, arXiv 2504.18583), which draft several tokens in one pass."""

from spec_kd.parallel.config import (
    ParallelDrafting,
    find_mask_token,
    is_parallel_draft,
    read_parallel_drafting,
    write_parallel_drafting,
)

__all__ = [
    "ParallelDrafting",
    "find_mask_token",
    "is_parallel_draft",
    "read_parallel_drafting",
    "write_parallel_drafting",
]
