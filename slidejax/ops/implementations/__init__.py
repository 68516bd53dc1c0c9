"""The implementations of the products: one file for each, and `base`, which says how to add one."""
