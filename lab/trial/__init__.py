"""Runs one experiment as a child process that can do no harm.

In: a train.py, settings and a seed. Out: whether it ran, its score, and whether the machine was in order (`runner`).
`guard` enforces limits, `sandbox` confines the process, `crash` summarizes a failure.
"""
