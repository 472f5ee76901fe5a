"""Where a trainer gets the target's distribution from: a live model, or stored columns."""
