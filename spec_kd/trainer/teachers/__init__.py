"""Where a trainer gets the target's distribution from: a live model, stored columns, or what serving left."""
