"""Many machines: an engine whose work is done by workers of a Ray cluster. Ray is imported when a worker is needed."""
