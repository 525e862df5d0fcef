"""What setup.cfg cannot say: the part in C. Without a compiler the rest works, with llama.cpp's own attention."""

from setuptools import Extension, setup

setup(
    ext_modules=[
        Extension(
            "aiosd.llm._attention",
            sources=["aiosd/llm/native/attention.c"],
            depends=["aiosd/llm/native/attention.h", "aiosd/llm/native/kernel.h"],
            extra_compile_args=["-O3"],
            optional=True,
        )
    ]
)
