"""`titan-adam-mini check`: tests AdamMini on GPUs, or small versions of the stages on a CPU.

    command     the flags, the stages in order, the printed table and the JSON
    runner      runs a process with a deadline, and ends all its descendants
    __main__    the entry point of such a process, for one stage
    stage       inputs and results of stages, and how they start ranks
    stages/     one module per stage, each with `run(context) -> Result`

Shared by the stages and the tests:

    oracle      AdamMini in float64, block by block, as in the paper
    engines     the kernels' engines compared with the reference kernel, without an optimizer
    decoder     a small decoder with odd sizes
    meshes      the decoder on device meshes
    injected    steps with given gradients
    tensors     Llama 3's 291 tensors, scaled down

For torchtitan's trainer: `trainer` (one run, and its data), `flavor` (the models), `sizes`, `llama3.toml`.
"""
