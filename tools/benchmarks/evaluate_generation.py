"""Generations that tools/benchmarks/evaluate.py asks of ours and of HFLM: which prompts, and which text ends an answer.

Three kinds: answers that are equally long; answers of which half end at a quarter of that, before one stop text, as
where a task's next question begins; several samples of each prompt, at equal lengths.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from llm.errors import UserError
from llm.evaluate.continuing import continue_
from llm.evaluate.encode import Encoder
from llm.evaluate.generation_kwargs import read_settings
from llm.evaluate.requests import Continue, Continued
from llm.generation.pictures import Pictures
from llm.generation.text import context_length
from llm.parallel.replica import Replica
from llm.tokenizer import Tokenizer
from vision.opening import LIMITS

Asked = list[tuple[str, dict[str, Any]]]
"""Prompts with what lm-eval calls their generation_kwargs."""
NEW_TOKENS = 128
WORDS = (10, 80)
"""Of prompts: they lie evenly between."""
SAMPLES = 8
STOP_CHARACTERS = 3
EQUAL, STOPS, SAMPLED = "generation, equal lengths", "generation, stops", f"generation, {SAMPLES} samples"


@dataclass
class Writer:
    """What continues texts: ours, from texts to texts."""

    replica: Replica
    tokenizer: Tokenizer
    batch_tokens: int

    def answers(self, asked: Asked) -> list[str]:
        """The answers in order; a prompt that is repeated with a temperature has other draws."""
        encoder = Encoder(self.tokenizer, context_length(self.replica.model.args))
        times: Counter[str] = Counter()
        requests = []
        for text, kwargs in asked:
            new_tokens, stop, sampling, beams = read_settings(kwargs)
            ids, _ = encoder.prompt(text, new_tokens)
            requests.append(Continue(ids, new_tokens, stop, sampling, times[text], beams=beams))
            times[text] += 1
        pictures = Pictures(None, "model", LIMITS)
        made = continue_(
            self.replica, self.tokenizer, self.tokenizer.end_ids, requests, self.batch_tokens, pictures
        )
        found: dict[int, Continued] = dict(made)
        return [found[index].text for index in range(len(requests))]


def generations(writer: Writer, text: str, number: int) -> dict[str, Asked]:
    """The requests of each kind, `number` of the first. UserError where a text is too short to find a stop text in what
    the model makes of it."""
    words = text.split()
    count = 8 * number
    if len(words) < count + WORDS[1]:
        raise UserError(f"a text of {len(words)} words is too short for {count} prompts")
    step = (len(words) - WORDS[1]) // count
    prompts = [
        " ".join(words[step * i : step * i + WORDS[0] + i % number * (WORDS[1] - WORDS[0]) // number])
        for i in range(count)
    ]
    greedy: dict[str, Any] = {"until": [], "max_gen_toks": NEW_TOKENS, "do_sample": False}
    answers = writer.answers([(prompt, greedy) for prompt in prompts])
    stop, early, never = stop_text(answers, number // 2)
    drawn = {"until": [], "max_gen_toks": NEW_TOKENS, "do_sample": True, "temperature": 1.0, "top_k": 0}
    return {
        EQUAL: [(prompt, greedy) for prompt in prompts[:number]],
        STOPS: [(prompts[i], greedy | {"until": [stop]}) for i in (*early, *never)],
        SAMPLED: [(prompt, drawn) for prompt in prompts[:number:SAMPLES] for _ in range(SAMPLES)],
    }


def stop_text(answers: Sequence[str], number: int) -> tuple[str, list[int], list[int]]:
    """A text with so many answers in which it first stands at about a quarter, and as many in which it does not stand.
    """
    early: dict[str, list[int]] = {}
    for i, answer in enumerate(answers):
        near = {answer[at : at + STOP_CHARACTERS] for at in range(len(answer) // 5, len(answer) * 3 // 10)}
        for text in near:
            if answer.find(text) >= len(answer) // 5:
                early.setdefault(text, []).append(i)
    for text in sorted(early, key=lambda text: (-len(early[text]), text)):
        never = [i for i, answer in enumerate(answers) if text not in answer]
        if len(early[text]) >= number and len(never) >= number:
            return text, early[text][:number], never[:number]
    raise UserError("no text ends half of the answers at a quarter of their length; give another text")
