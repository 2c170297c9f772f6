"""What launch/gpu_check.sh runs: one module per stage, each with `run(check) -> Result`, in a process of its own.

__main__    the table of stages, the budget, the printed table and the json
runner      one stage in a subprocess with a deadline
stage       what the stages share, and the entry point of their processes
"""
