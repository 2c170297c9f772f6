"""Memory: planned before a run (`plan`), simulated (`estimate`), and read from what a run recorded (`snapshot`)."""
