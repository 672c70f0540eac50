"""Continue a prompt with a trained model.

    python launch/generate.py --model runs/quickstart --prompt "def " --max_new_tokens 200 --temperature 0.7

--model is a run folder (its newest checkpoint), a checkpoint or `checkpoints` folder, a model folder that
tools/convert.py made, or a foreign one (Hugging Face or Meta) as it is.
"""

import sys

import torch

from llm import LLM
from llm.cli import run_cli
from llm.errors import UserError
from llm.generate import generate
from llm.pretrained import tokenizer_of


def continue_prompt(
    model: str,
    prompt: str = "",
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    stop: bool = True,
    average: bool = False,
) -> None:
    """Print the continuation of a prompt.

    model: run folder, checkpoint, model folder, or a Hugging Face or Meta folder
    prompt: text to continue; empty = begin a document
    max_new_tokens: most tokens to add
    temperature: 0 = greedy; 1 = the model's own distribution
    top_k: keep only the k likeliest tokens
    top_p: keep the likeliest tokens up to this probability
    seed: of the random choices
    stop: end at the end of the document
    average: use the moving average of the weights, of a run with optim.ema_decay
    """
    tokenizer = tokenizer_of(model)
    network = LLM.from_pretrained(model, average=average)
    if torch.cuda.is_available():
        network = network.to("cuda", torch.bfloat16)
    try:
        (ids,) = generate(
            network,
            [tokenizer.prompt_ids(prompt)],
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            stop_ids=tokenizer.end_ids if stop else (),
            seed=seed,
        )
    except ValueError as error:  # a setting out of range
        raise UserError(f"--{error}") from None
    sys.stdout.write(tokenizer.decode(ids) + "\n")


if __name__ == "__main__":
    run_cli(continue_prompt)
