"""The implementations of the products."""
