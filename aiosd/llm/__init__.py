"""The LLM core: one llama.cpp model that many sequences share, one batch at a time.

Files, from the bottom up:

    spec.py        what a core is told at its start (light: the supervisor and the CLI import it)
    modelfile.py   what a GGUF says about itself, read before llama.cpp touches it
    llama.py       the only file that touches llama_cpp: Model, Context, Batch, Grammar
    sampling.py    one token from one row of logits
    tokens.py      text to token ids, recent segments remembered
    text.py        bytes to characters to pieces: split UTF-8, stop strings, thoughts, triggers
    numbers.py     numbers between limits as rules of a grammar (pure)
    pattern.py     regular expressions as rules of a grammar (pure)
    document.py    a JSON Schema's references, and several schemas as one (pure)
    schema.py      JSON Schema to grammar
    chat.py        messages to prompt: what the template cannot do is done for it
    dialects.py    how families of models write tool calls, and how they are read
    structured.py  keeps a generation inside a grammar: check first, constrain on refusal
    request.py     a submitted call: first its text (`Prepared`), then a Sequence; or an errno with a sentence
    front.py       the same in a process of its own, for texts that take long
    sequence.py    the record of one generation
    policy/        who runs next (pure)
    prefix.py      which cached tokens a prompt can reuse (pure)
    slots.py       which sequence lies where in the KV cache; counts
    stats.py       counts and times
    engine.py      plan → decode → settle
    embed.py       vectors, in a context of their own
    loading.py     from a ModelSpec to a calibrated engine, or one line that says why not
    core.py        the process: kernel's messages in, the engine's messages out

Nothing here knows agents: a call is a key, a peer and a request.
"""
