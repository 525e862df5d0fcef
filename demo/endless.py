"""An agent that never ends by itself: an example for `aios-kill`."""

import libaios as aios

while True:
    for _ in aios.llm.chat(
        [{"role": "user", "content": "Tell me a story."}], max_tokens=500, ignore_eos=True, temperature=1.0, stream=True
    ):
        pass
