"""Language models: reading, serving and evaluating them."""
