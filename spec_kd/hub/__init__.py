"""A trained draft on its way out: a folder that servers load, the commands that serve it, its model card."""

from spec_kd.hub.card import carry_model_card, extend_model_card
from spec_kd.hub.export import export_draft
from spec_kd.hub.serving import serving_commands

__all__ = ["carry_model_card", "export_draft", "extend_model_card", "serving_commands"]
