"""Where memory goes in a training run: known before it, simulated, and read from what it recorded.

facts        from a run to everything the plan says of it, with the verdict
plan         the command `plan`, and what it prints (plan_tables)
activations  an estimate of what one more sequence takes (imports torchtitan)
simulate     a training step on fake tensors (imports torchtitan), with torch's trackers (tracker) and operators that
             stand in for a GPU's (standins)
estimate     the command `estimate`: the peak of a step by category, and what fits a budget (peaks, fit, peak_tables)
snapshot     the command `snapshot`: what a GPU's allocator recorded
picture      stacked bars of all of them
"""
