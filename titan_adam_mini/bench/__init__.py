"""`titan-adam-mini bench`: step time and state of optimizers side by side, on the parameters of one rank of a run.

rank_params  the parameters of one rank, as data and allocated (shards: from torchtitan's configuration)
competitors  the optimizers that are measured
measure      how they are measured
tables       the results as JSON and as a table
command      the command `bench`
"""
