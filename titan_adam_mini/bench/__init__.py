"""`titan-adam-mini bench`: step time and state of optimizers side by side, on what one rank of a run really holds.

`part.py` says what a rank holds and allocates it, `competitors.py` who is measured, `measure.py` how; `tables.py` what
is shown of it, and `command.py` is what a user calls.
"""
