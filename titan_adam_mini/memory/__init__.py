"""Where memory goes in a training run: what every rank will hold, known before the run.

holdings     pure arithmetic: what any rank holds of parameters, gradients and optimizer state, to the byte
checks       pure: what cannot run, or be saved, on its mesh
facts        from a run to everything the plan says of it, with the verdict
plan         the command `plan`: arguments, tables, JSON
stages       torchtitan's configuration -> one rank of every pipeline stage, as data (imports torchtitan)
activations  an estimate of what one more sequence takes (imports torchtitan)
"""
