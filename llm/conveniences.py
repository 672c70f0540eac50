"""What a notebook wants of a model: read one from a path, continue texts with it, write it to a folder."""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast, overload

import torch
from torch import Tensor, nn

from llm.errors import NoTokenizer, UserError

if TYPE_CHECKING:
    from os import PathLike

    from PIL.Image import Image

    from llm.args import ModelArgs
    from llm.data.conversation import Message
    from llm.generation.text import Continuer, Prompt
    from llm.model import LLM
    from llm.tokenizer import Tokenizer


Images = Sequence["str | PathLike[str] | bytes | Image"]
"""Of a text: files, what files hold, or images of Pillow."""


class Conveniences(nn.Module):
    """Methods of LLM that reach for files and tokenizers, which know models, not the reverse: so they import late."""

    args: "ModelArgs"
    origin: Path | None = None
    """What `from_pretrained` read."""
    _tokenizer: "Tokenizer | None" = None

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        dtype: torch.dtype = torch.float32,
        *,
        average: bool = False,
        text_only: bool = False,
    ) -> "LLM":
        """The model of a run folder (its newest checkpoint), a `checkpoints` folder, a checkpoint, a model folder, or a
        foreign folder of a known family (Hugging Face or Meta), in `dtype`.

        average: the moving average of its weights, which a run with optim.ema_decay keeps. text_only: leave out the
        vision tower of a foreign folder. One process, no launcher.
        Raises UserError naming the file when something is missing or damaged.
        """
        from llm.pretrained import load_model  # files know models, not the reverse

        model = load_model(path, dtype, average, text_only)
        model.origin = Path(path)
        return model

    @property
    def tokenizer(self) -> "Tokenizer | None":
        """The tokenizer that lies beside what `from_pretrained` read, opened when first asked for; None where there is
        none. Another can be set. UserError naming the file when it is damaged.
        """
        if self._tokenizer is None and self.origin is not None:
            from llm.pretrained import tokenizer_of

            with suppress(NoTokenizer):
                self._tokenizer = tokenizer_of(self.origin)
        return self._tokenizer

    @tokenizer.setter
    def tokenizer(self, tokenizer: "Tokenizer | None") -> None:
        self._tokenizer = tokenizer

    @overload
    def generate(self, text: str, **settings: Any) -> str: ...

    @overload
    def generate(self, text: Sequence[str], **settings: Any) -> list[str]: ...

    def generate(  # type: ignore[misc]  # the overloads say what comes back, not each setting again
        self,
        text: str | Sequence[str],
        *,
        images: "Images | Sequence[Images] | None" = None,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        repetition_penalty: float = 1.0,
        seed: int = 0,
        stop: bool = True,
        stop_texts: Sequence[str] = (),
        num_beams: int = 1,
        length_penalty: float = 1.0,
        early_stopping: bool = False,
    ) -> str | list[str]:
        """The continuation of a text, or of each of several in one batch: what comes after it, with its first space.

        An empty text begins a document; an encoder-decoder reads the text, and what comes back is its answer. `stop`
        ends at an end mark, `stop_texts` before the first of these texts that the continuation comes to;
        llm/generation/sampling.py and beams.py say what the other settings mean. A continuation ends where the context
        (args.max_seq_len) does.

        images: those of the text, of a model with vision: paths, what files hold as bytes, or images of Pillow; of
        several texts a list of these for each. The first `<image>` of a text stands for the first one; they stand
        before a text without.
        Raises ValueError for a setting out of range and for images that are none, UserError where there is no
        tokenizer, an image cannot be read, placeholders are more or fewer than images, a text fills the context, or
        logits are not finite.
        """
        from llm.generation.beams import Beams
        from llm.generation.sampling import Sampling

        sampling = Sampling(temperature, top_k, top_p, repetition_penalty, seed)
        beams = Beams(num_beams, length_penalty, early_stopping)
        continuer = self._continuer()
        texts = [text] if isinstance(text, str) else list(text)
        given = _images_of(None if isinstance(text, str) else len(texts), images)
        prompts = _prompts(continuer, texts, given)
        if not prompts:
            return []
        made = continuer.complete(prompts, sampling, max_new_tokens, stop, stop_texts=stop_texts, beams=beams)
        return made[0].text if isinstance(text, str) else [done.text for done in made]

    def stream(
        self,
        text: str,
        *,
        images: "Images | None" = None,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        repetition_penalty: float = 1.0,
        seed: int = 0,
        stop: bool = True,
        stop_texts: Sequence[str] = (),
    ) -> Iterator[str]:
        """The continuation of a text piece by piece, as its tokens are made: together the pieces are what `generate`
        gives. A character of several tokens comes whole, and what may begin a stop text waits until it is none.

        Arguments and errors are as of `generate`; what is wrong with them is said at once.
        """
        from llm.generation.sampling import Sampling
        from llm.generation.stops import StopTexts

        sampling = Sampling(temperature, top_k, top_p, repetition_penalty, seed)
        StopTexts(stop_texts)
        continuer = self._continuer()
        prompts = _prompts(continuer, [text], _images_of(None, images))
        made = continuer.stream(prompts, sampling, max_new_tokens, stop, stop_texts=stop_texts)
        return (piece for _, piece, _ in made if piece)

    def chat(
        self,
        messages: "str | Sequence[Message]",
        *,
        system: str | None = None,
        template: str = "auto",
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        repetition_penalty: float = 1.0,
        seed: int = 0,
    ) -> str:
        """What the assistant says next: to a text that the user says, or in a conversation, a list of messages with
        `role` and `content`. Add the answer and the next message to the list, to go on.

        system: what the system says first. template: auto (the chat template that came with the tokenizer), llama3,
        llama4, chatml, gemma, mistral, or the path of a .jinja file. The other settings and errors are as of
        `generate`; UserError where there is no template, or it cannot be used.
        """
        from llm.generation.chat import Chat
        from llm.generation.sampling import Sampling
        from llm.pretrained import template_for

        sampling = Sampling(temperature, top_k, top_p, repetition_penalty, seed)
        if self.args.encoder_layers:
            raise UserError(f"{self._called} is an encoder-decoder, which answers a text and keeps no conversation")
        found = template_for(self.origin, self._tokenizer_for("texts cannot be read or written"), template)
        asked = [{"role": "user", "content": messages}] if isinstance(messages, str) else messages
        continuer = self._continuer(found.end_ids)
        prompt = continuer.prompt_of(Chat(found, system).ids(asked), "the conversation")
        return continuer.complete([prompt], sampling, max_new_tokens)[0].text

    @property
    def _called(self) -> str:
        """For messages."""
        return "this model" if self.origin is None else str(self.origin)

    def _continuer(self, end_ids: Sequence[int] | None = None) -> "Continuer":
        from llm.generation.text import Continuer

        tokenizer = self.tokenizer
        if tokenizer is None:
            raise NoTokenizer(
                f"{self._called} has no tokenizer, so text cannot be read or written; set model.tokenizer = "
                f"llm.tokenizer.load_tokenizer(...), or give token ids to llm.generate.generate"
            )
        return Continuer(cast("LLM", self), tokenizer, self._called, end_ids)

    @torch.no_grad()
    def predict(self, text: str | Sequence[str], *, batch_tokens: int = 16384) -> Tensor:
        """What the prediction head says of a text, (n,), or of each of several, (texts, n), float32 on the CPU: the
        probability of each class, or of each label, or values in the units of labels; args.prediction_names says of
        which. A text longer than the context (args.max_seq_len) is cut after its beginning.

        batch_tokens: of the texts that are computed together. Dropout is off.
        Raises ValueError where the model has no prediction head, UserError where there is no tokenizer or a text is
        empty.
        """
        from llm.data.labelled import encoded
        from llm.generation.text import context_length
        from llm.layers.prediction import answers_of, documents_of

        if not self.args.n_prediction:
            raise ValueError("model.n_prediction=0: the model has no prediction head")
        model, tokenizer = cast("LLM", self), self._tokenizer_for("texts cannot be read")
        texts = [text] if isinstance(text, str) else list(text)
        for number, one in enumerate(texts, 1):
            if not one:
                raise UserError(f"text {number} is empty")
        ids = [encoded(tokenizer, one)[: context_length(self.args)] for one in texts]
        trained, device = self.training, next(self.parameters()).device
        found = torch.empty(len(texts), self.args.n_prediction)
        self.eval()
        for batch in _batches([len(one) for one in ids], batch_tokens):
            inputs = documents_of(self.args, [ids[i] for i in batch], device)
            hidden = model(inputs, return_hidden=True).hidden
            found[batch] = answers_of(self.args, model.predictions(hidden, inputs)).float().cpu()
        self.train(trained)
        return found[0] if isinstance(text, str) else found

    def _tokenizer_for(self, so: str) -> "Tokenizer":
        """Raises NoTokenizer saying that there is none, so what cannot be done."""
        if self.tokenizer is None:
            raise NoTokenizer(
                f"{self._called} has no tokenizer, so {so}; set model.tokenizer = llm.tokenizer.load_tokenizer(...)"
            )
        return self.tokenizer

    def save_pretrained(self, path: str | Path, tokenizer: "Tokenizer | None" = None) -> None:
        """Write a model folder, whole or not at all, that `from_pretrained` and model.init_from read, in the
        parameters' dtype.

        tokenizer: to lie beside the weights; default: the model's own, if it has one. With the tokenizer that came
        with the model its chat template goes, too. Raises UserError when `path` exists.
        """
        from llm.checkpoint.model_folder import write_model_folder
        from llm.checkpoint.weights import ModuleWeights
        from llm.pretrained import template_beside

        template = None
        with suppress(UserError):  # weights are worth saving without what text is read by
            own = self.tokenizer
            tokenizer = own if tokenizer is None else tokenizer
            if self.origin is not None and own and tokenizer and tokenizer.fingerprint == own.fingerprint:
                template = template_beside(self.origin)
        dtype, weights = next(self.parameters()).dtype, ModuleWeights(self)
        write_model_folder(Path(path), self.args, weights, dtype=dtype, tokenizer=tokenizer, template=template)


def _prompts(continuer: "Continuer", texts: Sequence[str], images: Sequence[Sequence[object]]) -> "list[Prompt]":
    names = [f"prompt {i + 1}" for i in range(len(texts))]
    pictures = [continuer.pictures.given(of, name) for of, name in zip(images, names, strict=True)]
    return [
        continuer.prompt(one, name, str(i), seen)
        for i, (one, name, seen) in enumerate(zip(texts, names, pictures, strict=True))
    ]


def _batches(lengths: Sequence[int], most: int) -> list[list[int]]:
    """Numbers of texts of these lengths, those together that have no more tokens, or one that has; the longest first.
    """
    found: list[list[int]] = []
    tokens = 0
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if not found or tokens + lengths[i] > most:
            found.append([])
            tokens = 0
        found[-1].append(i)
        tokens += lengths[i]
    return found


def _images_of(texts: int | None, images: object) -> list[Sequence[object]]:
    """The images of each of so many texts; None = of a single one, whose list it is. ValueError where they are no
    lists."""
    if images is None:
        return [()] * (1 if texts is None else texts)
    whole = _listed(images, "images")
    if texts is None:
        return [whole]
    if len(whole) != texts:
        raise ValueError(f"images has lists for {len(whole)} texts of {texts}; give one for each, which may be empty")
    return [_listed(found, f"images of prompt {number}") for number, found in enumerate(whole, 1)]


def _listed(images: object, name: str) -> Sequence[object]:
    if isinstance(images, str | bytes) or not isinstance(images, Sequence):
        raise ValueError(f"{name}: a {type(images).__name__} is no list of images")
    return images
