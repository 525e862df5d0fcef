"""Deeds that a sandbox must stop, one file for each family.

A deed is a function that does one forbidden thing. It returns when it has done it, and raises OSError when it was
stopped. `stage.py` makes what the deeds are done to; `run.py` does them, each in a process of its own, and prints
what became of each. The tests and `benchmarks/escapes.py` run it outside of a sandbox first: a deed that cannot be done
there proves nothing.
"""
