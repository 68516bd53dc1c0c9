"""An entry of the tuning table, for the tests of the table and of the choice by it."""


def entry(rows, us, **changes):
    return {
        "in": 128,
        "out": 64,
        "pattern": "6:8",
        "dtype": "int8",
        "rows": rows,
        "us": us,
    } | changes
