"""Speculative decoding of our own: batched, and with every round and every rejection on record."""

from spec_kd.decoding.rounds import Round, SpeculativeCompletion
from spec_kd.decoding.speculative import generate_speculatively

__all__ = ["Round", "SpeculativeCompletion", "generate_speculatively"]
