"""The claims of arXiv 2503.07807, measured again: `python -m experiments.paper_claims --help`, from the root.

A profile (cpu.yaml, gpu.yaml) says everything. Stages, each of which continues where it was killed:

    plan       cells by rank, with estimated minutes
    targets    a generic target, a target of each domain, generic drafts
    drift      acceptance of the generic draft with both targets; what a round costs
    answers    queries of the three scenarios, and what the domain target answers
    runs       the cells, a JSON line each
    report     tables and plots, from the JSON lines and nothing else
"""
