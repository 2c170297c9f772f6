"""Code that the commands share; importing it imports neither torch nor torchtitan.

flags             flags that several commands have, and their checks
isolated_process  runs functions that need torchtitan in a process that ends before the command's own work begins
trainer           torchtitan's trainer as a process: its command line, its log, stopping it
signals           SIGTERM as an interrupt
figures           pictures
versions          device, versions and commit, for captions
"""
