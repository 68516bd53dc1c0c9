"""`slidejax bench` and `slidejax tune`: linear layers timed side by side, as users write them in JAX and with slidejax."""
