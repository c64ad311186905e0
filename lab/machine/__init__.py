"""What this machine is, how it is doing, and what fits it.

In: the operating system's and MLX's answers. Out: the hardware that selects a preset's tier, the condition before and
after a run, the model and batch that five minutes pay for; and `backend`, the one module that imports MLX.
"""
