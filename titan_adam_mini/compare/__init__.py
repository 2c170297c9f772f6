"""Does AdamMini reach AdamW's loss on this model? Runs with equal data and equal starts, and a report of them.

variants -> what is compared; settled -> what a folder was made with; plan -> which runs that takes; training -> one
run; work -> all of them, side by side; record -> what a run said; statistics, report, tables, picture -> what follows
from it; command -> the command `compare`.
"""
