"""Linear attention in plain XLA: `bidirectional`, `causal`, `segments`.

`blocks` plans steps and cuts sequences, `chunks` computes one block, and
`products` holds its matrix products.
"""
