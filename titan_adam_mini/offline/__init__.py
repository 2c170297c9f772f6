"""A torchtitan configuration, read and built on the meta device, without a run: no accelerator, no weights, no network.

build        `configured` reads it, once per command; `built` builds the parallelised model of one rank of N
refusals     settings that torchtitan's trainer would refuse only after the nodes are allocated
full_model   partition and shapes of the model before it is sharded
stages       one rank of every pipeline stage as data: a `Run`
rank_memory  pure arithmetic: the memory of any rank of a `Run`, to the byte
checks       pure: what cannot run, or be saved, on its mesh

Modules that import torchtitan run in a separate process (`tools/isolated_process.py`).
"""
