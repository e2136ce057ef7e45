"""Training: pure steps, data parallelism, checkpoints, metrics, reports.

`loop.train_and_evaluate(config, workdir)` is the entry point. This file
imports nothing, so that one part can be used without the dependencies of the
others.
"""
