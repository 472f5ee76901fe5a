"""Speculative decoding of our own: batched, and with every round and every rejection on record."""

from spec_kd.decoding.rounds import Round, SpeculativeText
from spec_kd.decoding.speculative import generate_speculatively

__all__ = ["Round", "SpeculativeText", "generate_speculatively"]
