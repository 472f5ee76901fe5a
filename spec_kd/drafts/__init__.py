"""A draft for a target that has no small sibling: made from the target or from a donor, before any training."""

from spec_kd.drafts.init_draft import InitialDraft, init_draft
from spec_kd.drafts.options import DraftShapeOptions

__all__ = ["DraftShapeOptions", "InitialDraft", "init_draft"]
