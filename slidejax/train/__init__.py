"""Training what will run sparse: the loop (`fit`), what to learn from a teacher (`distill`), a pruned model's recovery (`recover`).

Needs optax: ``pip install 'slidejax[train]'``.
"""
