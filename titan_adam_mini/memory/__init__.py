"""Where memory goes in a training run: known before it, simulated, and read from what it recorded.

holdings    pure arithmetic: what a rank holds of parameters, gradients and optimizer state, to the byte
plan        the command `plan`: the holdings of all ranks, checkpoint size, a verdict
activations an estimate of what one more sequence takes
estimate    the command `estimate`: the peak of a step by category (simulate, tracker), and what fits a budget (fit)
snapshot    the command `snapshot`: what a GPU's allocator recorded
picture     stacked bars of all of them
"""
