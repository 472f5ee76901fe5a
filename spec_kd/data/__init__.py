"""From prompts to a distillation dataset: what the target wrote, with its exact ids."""

from spec_kd.data.reference_scores import add_reference_scores
from spec_kd.data.responses import generate_responses, score_completions

__all__ = ["add_reference_scores", "generate_responses", "score_completions"]
