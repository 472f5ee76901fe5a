"""Speculative decoding of our own: batched, with every round and every rejection on record."""

from spec_kd.decoding.options import SpeculationOptions
from spec_kd.decoding.speculative import Round, SpeculativeCompletion, generate_speculatively

__all__ = ["Round", "SpeculationOptions", "SpeculativeCompletion", "generate_speculatively"]
