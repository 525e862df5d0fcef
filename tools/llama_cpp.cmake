# Read by CMake when it begins with llama.cpp itself (bootstrap.py tells it to). llama-cpp-python builds a library for
# command line tools with it, whatever is asked for; nothing here calls that, and it is a third of all the compiling.
set(LLAMA_BUILD_COMMON OFF)
