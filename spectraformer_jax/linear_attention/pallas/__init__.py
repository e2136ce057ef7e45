"""Linear attention as Pallas kernels.

`implementation` says which calls the kernels take, and passes them to `tpu` or
`gpu`, which loop over chunks as `scan` defines it. `bodies` does the work on
one chunk, and `hoist` removes from a feature map what does not depend on
tokens.
"""
