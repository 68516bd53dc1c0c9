"""Other kinds of weight that take the place of a packed one in a tree of parameters."""
