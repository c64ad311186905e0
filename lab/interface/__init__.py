"""What a person sees and types beside training: panel, report, samples, exports, doctor, clean-up.

In: run folders, journals, the state of the machine. Out: text, pictures and HTML; nothing here decides a result.
"""
