"""A draft for a target that has no small sibling: which shape, and made from the target or from a donor."""

from typing import TYPE_CHECKING

from spec_kd.drafts.init_draft import InitialDraft, init_draft
from spec_kd.drafts.options import DraftShapeOptions
from spec_kd.lazy_imports import import_lazily

if TYPE_CHECKING:
    from spec_kd.drafts.plan import plan_draft
    from spec_kd.drafts.plan_options import DraftPlanOptions
    from spec_kd.drafts.plan_report import DraftPlan, PlannedShape, ShortRun

__all__ = [
    "DraftPlan",
    "DraftPlanOptions",
    "DraftShapeOptions",
    "InitialDraft",
    "PlannedShape",
    "ShortRun",
    "init_draft",
    "plan_draft",
]

__getattr__, __dir__ = import_lazily(
    __name__,
    {
        "spec_kd.drafts.plan": ("plan_draft",),
        "spec_kd.drafts.plan_options": ("DraftPlanOptions",),
        "spec_kd.drafts.plan_report": ("DraftPlan", "PlannedShape", "ShortRun"),
    },
)
