"""`titan-adam-mini check`: shows on GPUs, or in small on a CPU, that AdamMini computes what it should.

    command     the flags, the stages in order, the printed table and the JSON
    runner      one process with a deadline, and nothing left running after it
    __main__    such a process: one stage
    stage       what stages are given and answer, and how they start ranks
    stages/     one module per stage, each with `run(context) -> Result`

What the stages compute with, and what the tests share:

    oracle      AdamMini in float64, block by block, straight from the paper
    engines     the kernels' engines against the reference kernel, without an optimizer
    decoder     a small decoder of odd sizes
    meshes      the decoder on device meshes
    injected    steps with gradients put there by hand
    tensors     Llama 3's 291 tensors in small

And for torchtitan's trainer: `trainer` (one run, and its text), `flavor` (the models), `sizes`, `llama3.toml`.
"""
