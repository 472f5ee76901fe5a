"""From prompts to a distillation data set: what the target wrote, with its exact ids."""

from spec_kd.data.responses import generate_responses

__all__ = ["generate_responses"]
