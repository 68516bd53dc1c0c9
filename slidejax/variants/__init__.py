"""What else may stand in a tree of parameters where a packed weight may."""
