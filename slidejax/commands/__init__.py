"""The command line: one module a command, with `SUMMARY`, `EXAMPLE`, `add_arguments` and `run`.

`main.COMMANDS` lists the modules. No other package of slidejax reads arguments of a command line.
"""
