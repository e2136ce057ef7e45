"""Linear attention in plain XLA.

`implementation` looks at a call: packed rows go to `segments`, which sorts them
for `causal`; other calls go to `causal` or `bidirectional`. These two loop over
blocks of positions, forward and backward. `plan` chooses the sizes of blocks,
and `blocks` reads and writes them. `chunks` does the work on one block, and
`steps` the work on one causal step; both scale features by `features`, multiply
matrices by `products`, and make outputs of a query's sums by `results`.
"""
