"""The LLM core: one llama.cpp model that many sequences share, one batch at a time; or a remote model, on another
server.

Files, from the bottom up:

    spec.py        the settings of a core (imports nothing heavy: the supervisor and the CLI use it)
    modelfile.py   the head of a GGUF, read before llama.cpp opens the file
    libraries.py   how C libraries wait and share out work, set before they are loaded
    ggml.py        llama.cpp's library in this process: handle, log, message at an abort, build
    attention.py   aiosd's own attention in llama.cpp's graphs; native/ is its part in C
    llama.py       owners of llama.cpp's objects: Model, LlamaContext, BatchBuffer, Grammar
    arrays.py      arrays by what is in them
    sampling.py    one token from each row of logits, in numpy and (native/sampling.c) for all rows at once
    penalties.py   changes to a row before that: bias, penalties, DRY, the least number of tokens
    mirostat.py    draws that keep a text's surprise near a target
    options.py     objects for these, made from the options of a call
    logprobs.py    log probabilities of the chosen tokens and of alternatives
    picking.py     the next token of every call of a step
    tokens.py      text to token ids, recent segments remembered
    text.py        bytes to characters to pieces: split UTF-8, stop strings, thoughts, triggers
    numbers.py     numbers between limits as rules of a grammar (pure)
    pattern.py     regular expressions as rules of a grammar (pure)
    document.py    a JSON Schema's references, and several schemas as one (pure)
    schema.py      JSON Schema to grammar
    dialects.py    how families of models write tool calls, and how these are parsed
    chat.py        messages to prompt; makes up for what the model's template cannot do
    gbnf.py        grammars that come with a call: read and limited before llama.cpp gets them
    structured.py  keeps a generation inside a grammar: check first, constrain on refusal
    prefix.py      which cached tokens a prompt can reuse (pure)
    sequence.py    the record of one generation
    request.py     a submitted call: first its text (`Prepared`), then a Sequence; or an errno with a sentence
    front.py       the work on texts in a process of its own, if it takes long
    policy/        which calls run next (pure)
    slots.py       which sequence lies where in the KV cache; counts
    blob.py        the state of a sequence as llama.cpp writes it, cut by tokens and joined
    contexts.py    states that have no slot: in memory, on disk, in a tree over tokens
    bases.py       beginnings of prompts that slots read in the store's memory
    cells.py       beginnings that slots share if all lie in one cache; counts its cells (pure)
    cache.py       every movement of a context between slot, memory and disk
    stats.py       counts and times
    lookup.py      the next tokens of a call, guessed from the text after an earlier copy of its last ones (pure)
    passes.py      how llama.cpp divides a batch into passes, and which gaps between slots are worth filling (pure)
    lookahead.py   how many guesses a step computes: what steps cost, measured, and what guesses are worth
    schedule.py    which calls compute what in a step, as one function
    engine.py      plan → decode → settle
    purse.py       how much calls may still use of budgets, checked before tokens are computed
    adapters.py    LoRA adapters: which call has which, and which has its turn
    embed.py       vectors and scores, in a context of their own
    embedqueue.py  which call of these has its turn
    embedcore.py   the process of a model that only makes vectors (`--embed-model`)
    pairs.py       a query and a document as one text
    saved.py       contexts by name, as files
    library.py     the calls about these files
    rope.py        positions beyond those of the training
    placement.py   on which device tensors lie
    kvlayout.py    has each slot cells of its own, or do all share them?
    room.py        how many tokens a slot holds, and how many slots or cells there are
    threads.py     how many compute a step, measured
    calibrate.py   how many tokens of prompts one batch computes, measured
    exact.py       does a row depend on the others in its batch?
    trial.py       is aiosd's own attention right for this model?
    loading.py     from a ModelSpec to a calibrated engine, or one line with the reason why not
    local.py       the backend that uses all of the above: handles each message of the kernel

    remote/        the backend of a remote model
    line.py        the channel to the kernel, as a core uses it
    backend.py     the interface between a core's process and its backend; knows nothing of llama.cpp
    core.py        the process: the kernel's messages in, a backend's steps, messages out

Nothing here knows agents: a call is a key, a peer and a request.
"""
