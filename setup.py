"""The parts in C, which setup.cfg cannot describe. Without a compiler the rest works: with llama.cpp's own attention,
tokens drawn by numpy, and no sandbox."""

from setuptools import Extension, setup

setup(
    ext_modules=[
        Extension(
            "aiosd.sandbox._confine",
            sources=["aiosd/sandbox/native/confine.c", "aiosd/sandbox/native/cage.c"],
            depends=["aiosd/sandbox/native/cage.h"],
            extra_compile_args=["-O2"],
            optional=True,
        ),
        Extension(
            "aiosd.llm._attention",
            sources=["aiosd/llm/native/attention.c"],
            depends=["aiosd/llm/native/attention.h", "aiosd/llm/native/kernel.h"],
            extra_compile_args=["-O3"],
            optional=True,
        ),
        Extension(
            "aiosd.llm._sampling",
            sources=["aiosd/llm/native/sampling.c"],
            # Without -ffp-contract=off the same seed sometimes gives another text than with numpy.
            extra_compile_args=["-O3", "-ffp-contract=off"],
            optional=True,
        ),
    ]
)
