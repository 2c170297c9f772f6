"""What the commands share, none of which imports torch or torchtitan at the start.

flags             flags that several commands have, and their refusals
isolated_process  work that needs torchtitan, in a process that ends before the command's own work begins
trainer           torchtitan's trainer as a process: its command line, its log, its end
signals           SIGTERM as an interrupt
figures           pictures
versions          device, versions and commit, for captions
"""
