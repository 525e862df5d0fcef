"""Deeds that a sandbox must prevent, one file for each family.

A deed is a function that does one forbidden thing. It returns when it has succeeded, and raises OSError when it was
prevented. `stage.py` makes the files and processes that deeds attack. `run.py` runs the deeds, each in a process of its
own, and prints their outcomes. The tests and `benchmarks/escapes.py` run it outside of a sandbox first: a deed that
fails there proves nothing.
"""
