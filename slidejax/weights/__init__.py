"""What a weight is: patterns, number formats, the packed form."""
