"""Text samples during training: continuations of `eval.prompts`."""

from llm.generate import generate
from llm.generation.text import context_length, continuation
from llm.parallel.collectives import main_decides
from llm.train.log import RunLog
from llm.train.run import Run
from llm.train.stop import Requests


def sample(run: Run, step: int, log: RunLog | None, requests: Requests) -> None:
    """Continue the prompts after step `step`; by rank 0, unless it was asked to stop, or where a forward needs the
    other ranks, by all alike.
    """
    layout = run.grid.layout
    if layout.zero_stage == 3 or max(layout.tensor, layout.pipeline, layout.expert) > 1:
        texts = continuations(run, step)
    else:
        texts = main_decides(lambda: [] if requests.stop else continuations(run, step), run.world)
    if log and texts:
        for prompt, text in zip(run.config.eval.prompts, texts, strict=True):
            log.sample(step, prompt, prompt + text)


def continuations(run: Run, step: int) -> list[str]:
    """A text for each prompt; drawn by the step, so that a run made again has the same."""
    settings, context = run.config.eval, context_length(run.config.model)
    try:
        found = generate(
            run.engine.replica.decoder(),
            run.prompts,
            max_new_tokens=[min(settings.sample_tokens, context - len(ids)) for ids in run.prompts],
            temperature=settings.temperature,
            stop_ids=run.tokenizer.end_ids,
            seed=step,
            n_ids=run.tokenizer.vocab_size,
        )
    except FloatingPointError as error:  # on all ranks alike; whether such a run goes on is the guard's to say
        return [f" ({error})"] * len(run.prompts)
    return [continuation(run.tokenizer, *row) for row in zip(run.prompts, found, strict=True)]
