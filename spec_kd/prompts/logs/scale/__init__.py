"""Reads logs beyond the memory of one machine: datatrove shares out the work, and the disk remembers."""
