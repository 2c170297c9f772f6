"""Memory per rank: planned before a run, simulated, and read from the snapshots that it recorded."""
