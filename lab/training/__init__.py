"""Runs one training, except for what train.py decides.

In: settings, token shards and the `main` function of a train.py. Out: a run folder with checkpoint, steps and result.
Holds the clock, seed and batches of a run, CPU kernels, and data-parallel training.
"""
