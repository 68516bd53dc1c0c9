"""Pruning all layers of a model, of any family (`slidejax.functional.Functional`).

`convert` prunes and packs a model with a `Method` of `methods` and the text of a `Calibration`.
Layers are pruned in order (`sequential`): the traced model (`program`) is cut into `stages`,
channels are rescaled first (`smooth`), programs compile ahead of their use (`ahead`), and finished
stages can be kept on disk (`store`). `grams` sums up the inputs of all layers at once.

`mixed` chooses a pattern for each layer: by the loss that pruning a layer brings (`sensitivity`,
`divergence`), under a budget (`choose`, `costs`).
"""
