"""Training: pure steps, data parallelism, checkpoints, metrics, reports.

`loop.train_and_evaluate(config, workdir)` is the entry point. Nothing is
imported here, so that one part can be used without the others' dependencies.
"""
