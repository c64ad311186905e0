"""One experiment as a child process that can do no harm.

In: a train.py, settings and a seed. Out: whether it ran, what it scored and whether the machine behaved (`runner`).
`guard` watches limits, `sandbox` confines, `crash` summarizes a failure.
"""
