"""Eight OpenAI clients that ask a run's endpoint without pause, and who answered them, until Ctrl-C.

.venv/bin/python docs/examples/load.py runs/mine
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import sys
import time
from collections import Counter
from pathlib import Path

import openai

NUM_CLIENTS = 8


async def ask(client: openai.AsyncOpenAI, versions: Counter[str], errors: list[str]) -> None:
    """Ask for ever; count the version that each answer names."""
    while True:
        a, b = random.randint(100, 999), random.randint(100, 999)
        try:
            answer = await client.chat.completions.create(
                model="learner", messages=[{"role": "user", "content": f"{a}+{b}"}], max_tokens=48
            )
            versions[answer.system_fingerprint or "?"] += 1
        except openai.OpenAIError as error:
            errors.append(f"{type(error).__name__}: {error}")
            await asyncio.sleep(1)


async def main(run: Path) -> None:
    """Tell every two seconds what has come."""
    endpoint = run / "endpoint.json"
    if not endpoint.is_file():
        sys.stdout.write(f"waiting for the endpoint of {run} …\n")
    while not endpoint.is_file():
        await asyncio.sleep(0.5)
    url = json.loads(endpoint.read_text())["url"]
    versions: Counter[str] = Counter()
    errors: list[str] = []
    begin = time.monotonic()
    # No retries: every error would be seen.
    async with openai.AsyncOpenAI(base_url=url, api_key=(run / "api_key").read_text().strip(), max_retries=0) as client:
        async with asyncio.TaskGroup() as tasks:
            for _ in range(NUM_CLIENTS):
                tasks.create_task(ask(client, versions, errors))
            while True:
                await asyncio.sleep(2)
                said = " · ".join(f"{version}: {number}" for version, number in versions.items())
                sys.stdout.write(f"{time.monotonic() - begin:4.0f} s   {said} · errors: {len(errors)} {errors[-1:]}\n")
                sys.stdout.flush()


with contextlib.suppress(KeyboardInterrupt):
    asyncio.run(main(Path(sys.argv[1])))
