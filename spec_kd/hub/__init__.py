"""What is published of a trained draft: a folder that servers load, and its model card."""

from spec_kd.hub.card import CardFacts, carry_model_card, extend_model_card
from spec_kd.hub.export import export_draft
from spec_kd.hub.export_options import ExportOptions
from spec_kd.hub.gguf import GGUFError, export_gguf
from spec_kd.hub.recommended import recommend_in_card
from spec_kd.hub.serving_file import ServingFile

__all__ = [
    "CardFacts",
    "ExportOptions",
    "GGUFError",
    "ServingFile",
    "carry_model_card",
    "export_draft",
    "export_gguf",
    "extend_model_card",
    "recommend_in_card",
]
