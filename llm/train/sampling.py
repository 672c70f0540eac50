"""Text samples during training: continuations of `eval.prompts`, in a run on conversations answers to them."""

from llm.generation.text import context_length
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
        for prompt, text, images in zip(run.config.eval.prompts, texts, run.prompts.images, strict=True):
            goes_on = run.template is None and not run.config.model.encoder_layers
            log.sample(step, prompt, prompt + text if goes_on else f"{prompt}\n-> {text}", images)


def continuations(run: Run, step: int) -> list[str]:
    """A text for each prompt; drawn by the step, so that a run made again has the same."""
    settings = run.config.eval
    return run.task.sample(
        run.engine.replica.decoder(),
        run.tokenizer,
        run.prompts.ids,
        images=run.prompts.images,
        most_tokens=settings.sample_tokens,
        context=context_length(run.config.model),
        temperature=settings.temperature,
        seed=step,
        end_ids=None if run.template is None else tuple(run.template.end_ids),
    )
