"""A model of ours as lm-eval (`pip install .[eval]`) asks one: its tasks on any model path and any layout.

    import lm_eval
    from llm.evaluate.lm_eval import LatticeLM

    lm_eval.simple_evaluate(model=LatticeLM(PATH), tasks=["arc_easy"])

The same file under torchrun evaluates on all its ranks. Each rank lets lm-eval make the same requests, and the runner
deals them; lm-eval would deal documents itself, repeat some where the ranks do not come out even, and draw other
few-shot examples on another number of ranks. So a rank says that it is the only one, and rank 0 of a machine has the
results. Conventions are those of llm/evaluate/encode.py; where they differ from lm-eval's own HFLM it is counted:
contexts that are cut on the left keep their BOS, and a continuation that shares a token with its context is scored with
that token. A rolling log-likelihood never scores BOS, which HFLM does where the tokenizer puts one.

Source of the interface: lm-eval 0.4.13, lm_eval/api/model.py and models/utils.py (normalize_gen_kwargs).
"""

import hashlib
import logging
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from tqdm import tqdm

from llm.data.conversation import Message
from llm.errors import UserError
from llm.evaluate.answer import Asked, answer, answered, collected
from llm.evaluate.encode import Encoder, Pair
from llm.evaluate.generation_kwargs import read_settings
from llm.evaluate.journal import Journal
from llm.evaluate.loading import files_digest, model_digest, open_replica
from llm.evaluate.requests import Answer, Continue, Continued, NonFinite, Request, Score, Scored, as_json, from_json
from llm.evaluate.runner import Runner
from llm.generation.device import Dtype, dtype_for, set_threads
from llm.generation.pictures import Pictures
from llm.generation.text import context_length
from llm.parallel.collectives import agreed_error, gather_json, main_decides
from llm.parallel.grid import Grid, make_grid
from llm.parallel.launch.process import read_world, start
from llm.parallel.layout import Layout
from llm.parallel.replica import Replica
from llm.parameters import ParameterTable
from llm.pretrained import args_of, chat_template_of, tokenizer_of
from llm.tokenizers.chat import ChatTemplate
from vision.opening import LIMITS

try:
    from lm_eval.api.model import LM
except ImportError as error:
    if error.name not in ("lm_eval", "lm_eval.api", "lm_eval.api.model"):
        raise
    raise ImportError("lm-eval is not installed; `pip install .[eval]` installs it", name="lm_eval") from None

LOG = logging.getLogger(__name__)
T = TypeVar("T")
TIMEOUT_S = 600.0
"""After which a rank gives up waiting for another."""


class Rendered(str):
    """A text that a chat template wrote: the control tokens in it are meant, and nothing else begins it."""


class LatticeLM(LM):
    """A run folder, checkpoint, model folder or foreign folder for lm-eval; see this module. Under torchrun the model
    is cut over `tensor` times `pipeline` ranks, the rest are data-parallel; `expert`: over how many of these experts
    are cut.

    chat_template: what `apply_chat_template=True` means: auto, the name of one of ours, or a file (launch/evaluate.py).
    """

    def __init__(
        self,
        path: str | Path,
        *,
        dtype: Dtype = "auto",
        batch_tokens: int = 16384,
        average: bool = False,
        chat_template: str = "auto",
        tensor: int = 1,
        pipeline: int = 1,
        expert: int = 1,
        threads: int | None = None,
        output: str | Path | None = None,
        grid: Grid | None = None,
        identity: Mapping[str, str] | None = None,
    ) -> None:
        """output: folder whose journal keeps the answers, so that a killed evaluation goes on with them. grid: the
        ranks, where the caller has them already. identity: what the journal is of beside the model, by names for
        messages. UserError where the model cannot be read, or the journal is of another one.
        """
        super().__init__()
        self.path = Path(path)
        self.grid = grid or _grid(tensor, pipeline, expert)
        self._device = self.grid.world.device
        args = args_of(self.path)
        self.tokenizer = tokenizer_of(self.path)
        self.encoder = Encoder(self.tokenizer, context_length(args), args.encoder_layers > 0)
        self.batch_tokens, self._choice = batch_tokens, chat_template
        self._opened: ChatTemplate | None = None
        self._pictures = Pictures(args.vision, str(path), LIMITS)
        if grid is None:
            set_threads(threads, sum(row.numel for row in ParameterTable.of(args).values()))
        self.dtype = dtype_for(self.path, dtype, self._device)
        self._average = average
        self.n_parameters = sum(row.numel for row in ParameterTable.of(args).values())
        self._journal = None if output is None else Journal(Path(output))
        self._identity = {
            "--dtype": _short(self.dtype),
            "its tokenizer": self.tokenizer.fingerprint,
            **(identity or {}),
        }
        self._replica: Replica | None = None
        self._digest: str | None = None
        if self._journal is None:
            self.replica()
        else:
            self._files, self._digest = main_decides(self._known, self.grid.world)
        self.counts: Counter[str] = Counter()
        """Of the requests so far: `truncated`, `joint`."""
        self.tokens: dict[tuple[str, int, int], int] = {}
        """Scored or generated, of each request: its task, document and place among those of the document."""
        self.statistics: Counter[str] = Counter()
        """Of requests: `all`, `different`, `in_the_journal`, `answered`."""

    def replica(self) -> Replica:
        """The model on these ranks, opened when it is first needed (collective)."""
        if self._replica is None:
            self._replica = open_replica(self.path, self.grid, self.dtype, self._average)
            digest = self._digest = model_digest(self._replica)
            if self._journal is not None:
                journal, said = self._journal, {"the model": digest, **self._identity}
                main_decides(lambda: journal.open(said, self._files, digest), self.grid.world)
        return self._replica

    @property
    def digest(self) -> str:
        """Of the model's weights and of what it makes of them (collective where it has not been opened)."""
        if self._digest is None:
            self.replica()
        assert self._digest is not None
        return self._digest

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """For each (context, continuation): log-likelihood in nats, and whether each token of it is the likeliest."""
        asked = [self._score(request) for request in requests]
        answers = [(a.logprob, a.greedy) for a in self._answers(asked, requests, disable_tqdm) if isinstance(a, Scored)]
        self._report(requests, [len(score.target) for score in asked])
        return self._kept("loglikelihood", requests, answers)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """For each (text,): log-likelihood in nats of all its tokens, each once."""
        asked: list[Score] = []
        asking: list[Any] = []
        ends = []
        for request in requests:
            windows = _of(request, partial(self.encoder.windows, request.args[0]))
            asked += [Score(context, target) for context, target in windows]
            asking += [request] * len(windows)
            ends.append(len(asked))
        found = [a.logprob for a in self._answers(asked, asking, disable_tqdm) if isinstance(a, Scored)]
        spans = list(zip([0, *ends], ends, strict=False))
        sums = [sum(found[a:b]) for a, b in spans]
        self._report(requests, [sum(len(s.target) for s in asked[a:b]) for a, b in spans])
        return self._kept("loglikelihood_rolling", requests, sums)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """For each (context, settings): what the model writes, up to the first of the texts `until`."""
        times: Counter[Continue] = Counter()
        asked = []
        for request in requests:
            one = self._continue(request)
            number = times[one] if one.sampling.temperature else 0  # a draw that is repeated is another draw
            times[one] += 1
            asked.append(replace(one, sample=number))
        answers = self._answers(asked, requests, disable_tqdm)
        found = [a for a in answers if isinstance(a, Continued)]
        self._report(requests, [a.tokens for a in found])
        return self._kept("generate_until", requests, [a.text for a in found])

    def apply_chat_template(self, chat_history: list[Message], add_generation_prompt: bool = True) -> str:
        """The conversation as text, up to where the assistant answers; without the generation prompt, up to the end of
        what its last message says, which is then continued."""
        template = self.template()
        if add_generation_prompt:
            return Rendered(template.prompt_text(chat_history)[0])
        text, _ = template.prompt_text(chat_history, generation=False)
        said = str(chat_history[-1]["content"]).strip()
        end = text.rfind(said) + len(said)
        if end < len(said):
            raise UserError(f"{template.name} does not render the last message as it stands, so it cannot be continued")
        return Rendered(text[:end])

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The source of the template, for lm-eval's results; None where none is applied."""
        if isinstance(chat_template, str):
            self._choice, self._opened = chat_template, None
        return self.template().source if chat_template else None

    @property
    def tokenizer_name(self) -> str:
        """Names its content, so that what lm-eval caches under it is never another one's."""
        return f"{self.tokenizer.kind}-{self.tokenizer.fingerprint}"

    def get_model_info(self) -> dict[str, Any]:
        """What lm-eval writes of the model into its results."""
        return {
            "model_num_parameters": self.n_parameters,
            "model_dtype": _short(self.dtype),
            "model_revision": str(self.path),
            "model_sha": self.digest,
        }

    def template(self) -> ChatTemplate:
        """The chat template. UserError where there is none."""
        if self._opened is None:
            self._opened = chat_template_of(self.path, self.tokenizer, self._choice)
        return self._opened

    def _score(self, request: Any) -> Score:
        context, continuation = request.args

        def pair() -> Pair:
            if isinstance(context, Rendered):
                return self.encoder.rendered(self.template(), context, (), continuation)
            return self.encoder.pair(context, continuation)

        found = _of(request, pair)
        self.counts["truncated"] += found.truncated
        self.counts["joint"] += found.joint
        return Score(found.context, found.target)

    def _continue(self, request: Any) -> Continue:
        context, settings = request.args

        def continued() -> Continue:
            new_tokens, stop, sampling, beams = read_settings(settings)
            if self.encoder.reads_sources:
                if isinstance(context, Rendered):
                    raise UserError("an encoder-decoder keeps no conversation; leave the chat template out")
                source, cut = self.encoder.source(context)
                self.counts["truncated"] += cut
                begin = (self.tokenizer.bos_id,)
                return Continue(begin, new_tokens, stop, sampling, beams=beams, source=source)
            if isinstance(context, Rendered):
                ids, cut = self.encoder.rendered_prompt(self.template(), context, new_tokens)
            else:
                ids, cut = self.encoder.prompt(context, new_tokens)
            self.counts["truncated"] += cut
            return Continue(ids, new_tokens, stop, sampling, beams=beams)

        return _of(request, continued)

    def _answers(self, asked: Sequence[Request], asking: Sequence[Any], quiet: bool) -> list[Answer]:
        """The answers to requests, on every rank (collective). asking: what of lm-eval's each is for."""
        once = Asked.of(asked)
        world = self.grid.world
        content = hashlib.blake2b("".join(once.keys).encode(), digest_size=16).hexdigest()
        if len(set(gather_json(content, world))) > 1:
            raise agreed_error("the ranks ask for different things, as with use_cache, which each rank has of its own")
        ends = self.tokenizer.end_ids
        if any(isinstance(request.args[0], Rendered) for request in asking):
            ends = tuple(dict.fromkeys([*ends, *self.template().end_ids]))
        self.statistics["all"] += len(asked)
        try:
            found = self._asked(once, ends, quiet)
        except NonFinite as error:
            raise UserError(f"{_name(asking[once.places.index(error.index)])}: {error}") from None
        return [found[place] for place in once.places]

    def _asked(self, once: Asked, ends: tuple[int, ...], quiet: bool) -> list[Answer]:
        """The answers to requests that differ, on every rank (collective)."""
        world, journal = self.grid.world, self._journal
        show = world.is_main and not quiet and sys.stderr.isatty()
        done = frozenset() if journal is None else answered(once, journal, self.grid)
        self.statistics += {"different": len(once.requests), "in_the_journal": len(done)}
        if len(done) < len(once.requests):
            runner = Runner(self.replica(), self.tokenizer, self.batch_tokens, ends, self._pictures)
            if journal is None:
                return self._gathered(runner.answers(once.requests, done), len(once.requests), show)
            answer(once, done, runner, journal, self.grid, show)
        assert journal is not None
        alone = Asked(once.requests, once.keys, list(range(len(once.requests))))
        kept = main_decides(lambda: [as_json(found) for found in collected(alone, journal)], world)
        return [from_json(found) for found in kept]

    def _gathered(self, batches: Iterator[list[tuple[int, Answer]]], number: int, show: bool) -> list[Answer]:
        """What the replicas have answered, on every rank (collective)."""
        mine: list[Any] = []
        with tqdm(total=number, unit="request", disable=not show) as bar:
            for batch in batches:
                mine += [[i, as_json(found)] for i, found in batch]
                bar.update(min(len(batch) * self.grid.rows.size, number - int(bar.n)))
        parts = gather_json(mine if self.grid.replica.rank == 0 else [], self.grid.world)
        found = {i: from_json(said) for part in parts for i, said in part}
        return [found[i] for i in range(number)]

    def _known(self) -> list[str | None]:
        """Digest of the model's files, and of the model where the journal has met these files. UserError where the
        journal is of something else."""
        assert self._journal is not None
        files = f"{files_digest(self.path, self._average)} as {_short(self.dtype)}"
        digest = self._journal.models().get(files)
        self._journal.check(self._identity if digest is None else {"the model": digest, **self._identity})
        return [files, digest]

    def _report(self, requests: Sequence[Any], tokens: Sequence[int]) -> None:
        """Keep their tokens; say what of the requests so far was not scored as it stands."""
        for request, number in zip(requests, tokens, strict=True):
            self.tokens[request.task_name, request.doc_id, request.idx] = number
        what = {
            "truncated": "contexts were cut on the left to fit the model's context",
            "joint": "continuations share a token with their context, and were scored with it",
        }
        if self.grid.world.is_main:
            for key, text in what.items():
                if self.counts[key]:
                    LOG.warning("%d %s", self.counts[key], text)

    def _kept(self, kind: str, requests: Sequence[Any], answers: list[T]) -> list[T]:
        """The answers, after lm-eval's cache has them, where it is used."""
        for request, found in zip(requests, answers, strict=True):
            self.cache_hook.add_partial(kind, request.args, found)
        return answers


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _name(request: Any) -> str:
    return f"{request.task_name} document {request.doc_id}"


def _of(request: Any, made: Callable[[], T]) -> T:
    """What is made of a request; an error says of which."""
    try:
        return made()
    except UserError as error:
        raise UserError(f"{_name(request)}: {error}") from None


def _grid(tensor: int, pipeline: int, expert: int) -> Grid:
    """The ranks that a launcher started, which are made a job here unless the caller has."""
    world = read_world()
    if world.size > 1 and dist.is_initialized():
        world = replace(world, store=dist.distributed_c10d._get_default_store())
    elif world.size > 1:
        world = start(TIMEOUT_S, torch.get_num_threads())
    layout = Layout(world.size, tensor=tensor, pipeline=pipeline, expert=expert, sequence_parallel=False)
    return make_grid(world, layout)
