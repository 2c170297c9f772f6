"""Where memory goes in a training run: what every rank will hold, known before the run.

holdings    pure arithmetic: what a rank holds of parameters, gradients and optimizer state, to the byte
plan        the command `plan`: the holdings of all ranks, checkpoint size, a verdict
activations an estimate of what one more sequence takes
"""
