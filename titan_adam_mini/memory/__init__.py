"""Memory of a training run: computed before it, simulated, and read from the snapshots it wrote.

facts        everything that the plan of a run contains, with the verdict
plan         the command `plan`, and its output (plan_tables)
activations  an estimate of the memory of one more sequence (imports torchtitan)
simulate     a training step on fake tensors (imports torchtitan), with torch's trackers (tracker) and stubs of a GPU's
             operators (gpu_stubs)
estimate     the command `estimate`: the peak of a step by category, and what fits a budget (peaks, fit, peak_tables)
snapshot     a memory snapshot of torch: reading it, and its peak (origins: what an allocation was for)
snapshot_command  the command `snapshot`
picture      stacked bars for all of them
"""
