"""The models on this machine, and downloads of others.

    places.py   where models lie: aiosd's own folder, and those of the hub's library, Ollama and LM Studio
    found.py    the list of them, and one of them by its name
    hub.py      downloads from a model hub, through huggingface_hub (extra `aiosd[hub]`)
    quants.py   names of quantisations, and which file of several is meant
    fit.py      does it fit into the memory of this machine?
    bert.py ggufwriter.py     how `aiosd get-embedder` makes its model

A model that is downloaded by any of these programs is one file (or several parts) in GGUF format, and is used
where it lies. Nothing here loads a model or imports llama.cpp, because settings, commands and the Makefile's tools use
it.
"""
