"""Describes this machine, its current condition, and what fits it.

In: data from the operating system and MLX. Out: the hardware that selects a preset's tier, the condition before and
after a run, and the model and batch that fit the time budget. Also `backend`, the only module that imports MLX.
"""
