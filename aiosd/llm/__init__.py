"""The LLM core: one llama.cpp model that many sequences share, one batch at a time; or a model that is elsewhere.

Files, from the bottom up:

    spec.py        what a core gets at its start (light: the supervisor and the CLI import it)
    modelfile.py   what a GGUF says about itself, read before llama.cpp touches it
    ggml.py        llama.cpp's library in this process: handle, log, last words, which build it is
    attention.py   attention of our own in llama.cpp's graphs; native/ is its part in C
    llama.py       owners of llama.cpp's objects: Model, LlamaContext, BatchBuffer, Grammar
    arrays.py      arrays by what is in them
    sampling.py    one token from each row of logits, in numpy and (native/sampling.c) for all rows at once
    penalties.py   what changes a row before: bias, penalties, DRY, the least number of tokens
    mirostat.py    draws that keep a text's surprise near a target
    options.py     what a call asks of these, made from the wire's numbers
    logprobs.py    what the model gave for the token that was chosen
    picking.py     the next token of every call of a step
    tokens.py      text to token ids, recent segments remembered
    text.py        bytes to characters to pieces: split UTF-8, stop strings, thoughts, triggers
    numbers.py     numbers between limits as rules of a grammar (pure)
    pattern.py     regular expressions as rules of a grammar (pure)
    document.py    a JSON Schema's references, and several schemas as one (pure)
    schema.py      JSON Schema to grammar
    dialects.py    how families of models write tool calls, and how they are read
    chat.py        messages to prompt: what the template cannot do is done for it
    gbnf.py        grammars that a call brings along: read and bounded before llama.cpp sees them
    structured.py  keeps a generation inside a grammar: check first, constrain on refusal
    prefix.py      which cached tokens a prompt can reuse (pure)
    sequence.py    the record of one generation
    request.py     a submitted call: first its text (`Prepared`), then a Sequence; or an errno with a sentence
    front.py       the same in a process of its own, for texts that take long
    policy/        who runs next (pure)
    slots.py       which sequence lies where in the KV cache; counts
    blob.py        the state of a sequence as llama.cpp writes it, cut by tokens and joined
    contexts.py    states that have no slot: in memory, on disk, in a tree over tokens
    bases.py       beginnings that slots read where the store keeps them
    cells.py       beginnings that slots share, where all lie in one cache; counts its cells (pure)
    cache.py       every movement of a context between slot, memory and disk
    stats.py       counts and times
    lookup.py      the next tokens of a call, guessed from where its last ones stood before (pure)
    lookahead.py   how many guesses a step computes: what steps cost, measured, and what guesses are worth
    schedule.py    who computes what in a step, as one function
    engine.py      plan → decode → settle
    purse.py       what calls may still use of budgets, before tokens are computed
    adapters.py    LoRA adapters: which call has which, and whose turn it is
    embed.py       vectors and scores, in a context of their own
    embedqueue.py  whose turn it is there
    embedcore.py   the process of a model that does nothing else (`--embed-model`)
    pairs.py       a query and a document as one text
    saved.py       contexts by name, as files
    library.py     the calls about those
    rope.py        positions beyond those of the training
    placement.py   on which device tensors lie
    kvlayout.py    has each slot cells of its own, or do all share them?
    room.py        how many tokens a slot holds, and how many slots or cells there are
    threads.py     how many compute a step, measured
    calibrate.py   how many tokens of prompts a batch holds, measured
    exact.py       does a row depend on the others in its batch?
    trial.py       is our attention right for this model?
    loading.py     from a ModelSpec to a calibrated engine, or one line that says why not
    local.py       the backend that has all of the above: what each message of the kernel means for it

    remote/        the backend of a model that is elsewhere
    line.py        the channel to the kernel, as a core uses it
    backend.py     the seam: what a core's process asks of a backend; no word of llama.cpp on this side
    core.py        the process: the kernel's messages in, a backend's steps, messages out

Nothing here knows agents: a call is a key, a peer and a request.
"""
