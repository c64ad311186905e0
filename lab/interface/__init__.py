"""Everything a person reads or types outside of training: panel, report, samples, exports, doctor, clean-up.

In: run folders, journals, the state of the machine. Out: text, images and HTML. Nothing here affects a result.
"""
