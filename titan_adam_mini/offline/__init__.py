"""A torchtitan configuration, read and built on the meta device, without a run: no accelerator, no weights, no network.

build        `configured` reads it, once per command; `built` makes the parallelised model of one rank of N
refusals     what torchtitan's trainer would refuse once it has the nodes
whole_model  partition and shapes of the model before it is sharded
stages       one rank of every pipeline stage as data: a `Run`
holdings     pure arithmetic: what any rank of a `Run` holds, to the byte
checks       pure: what cannot run, or be saved, on its mesh

Whatever imports torchtitan here runs in a process of its own (`tools/isolated_process.py`).
"""
