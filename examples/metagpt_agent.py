"""MetaGPT as an agent: a role with an action. Actions, not tools, decide what a role does.

    uv pip install metagpt==0.8.2 --override overrides.txt        # see docs/frameworks.md
    aios-run -- /path/to/venv/bin/python examples/metagpt_agent.py

MetaGPT reads the model's address from a file in the home folder, and writes its logs beside its package. Here both lie
in a temporary folder, which is removed at the end.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
from pathlib import Path

from arithmetic import MODEL, QUESTION, SYSTEM

CONFIG = """
llm:
  api_type: openai
  model: {model}
  base_url: {OPENAI_BASE_URL}
  api_key: {OPENAI_API_KEY}
  max_token: 128
"""


async def answer() -> str:
    from metagpt.actions import Action
    from metagpt.roles import Role
    from metagpt.schema import Message

    class Answer(Action):
        name: str = "Answer"

        async def run(self, history: list[Message]) -> str:
            return str(await self._aask(history[-1].content, [SYSTEM]))

    class Assistant(Role):
        name: str = "Ann"
        profile: str = "assistant"

        def __init__(self, **options: object) -> None:
            super().__init__(**options)
            self.set_actions([Answer])

    return str((await Assistant().run(QUESTION)).content)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        os.environ["HOME"] = os.environ["METAGPT_PROJECT_ROOT"] = folder
        config = Path(folder, ".metagpt", "config2.yaml")
        config.parent.mkdir()
        config.write_text(CONFIG.format(model=MODEL, **os.environ))
        print("answer:", asyncio.run(answer()))


if __name__ == "__main__":
    main()
