"""Which kernel, for which data, at what cost.

``python -m spectraformer_jax.study``; each command is a module with
`add_arguments(parser)` and `run(args)`.
"""
