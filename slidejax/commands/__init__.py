"""The command line. Each command is a module with `SUMMARY`, `EXAMPLE`, `add_arguments` and `run`.

`main.COMMANDS` lists the modules. No other package of slidejax reads arguments of a command line.
"""
