"""Trains a model with AdamW and AdamMini from the same initial weights on the same data, and reports the difference.

command         the command `compare`
configurations  torchtitan's configuration of every variant
variants        the optimizers and settings that are compared
folder          the folder of a comparison: its lock, and the settings it was made with
plan            which runs there are: the sweep of learning rates, then the seeds
training        one run of the trainer
runner          all runs, several at a time
record          losses and other figures of one run
statistics, report, tables, picture  the results
"""
