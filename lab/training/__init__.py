"""One training run, outside of what train.py decides.

In: settings, token shards and the `main` of a train.py. Out: a run folder with checkpoint, steps and result. Clock,
seed, batches, the CPU's kernels and several processes that train as one are here.
"""
