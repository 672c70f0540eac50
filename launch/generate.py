"""Continue prompts with a trained model.

    python launch/generate.py --model runs/quickstart --prompt "def " --max_new_tokens 200 --temperature 0.7
    python launch/generate.py --model runs/quickstart                                  # reads prompts from the terminal
    python launch/generate.py --model runs/quickstart --prompts in.jsonl --output out.jsonl
    python launch/generate.py --model runs/chat --chat --system "Answer in one sentence."
    python launch/generate.py --model runs/vision --image dog.jpg --prompt "<image>What is this?"

--model is a run folder (its newest checkpoint), a checkpoint or `checkpoints` folder, a model folder that
tools/convert.py made, or a foreign one (Hugging Face or Meta) as it is.
"""

import sys
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from llm.cli import run_cli
from llm.jobs.generate import continue_prompt

if __name__ == "__main__":
    run_cli(continue_prompt)
