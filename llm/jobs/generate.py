"""The command launch/generate.py: from flags to texts."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from llm import LLM
from llm.cli import Repeated, Verbatim
from llm.errors import UserError
from llm.generation.batch import BatchSettings, complete_file
from llm.generation.beams import Beams
from llm.generation.chat import HINT, Chat, Talk
from llm.generation.device import Dtype, device, dtype_for, set_threads
from llm.generation.sampling import Sampling
from llm.generation.terminal import converse, show
from llm.generation.text import Continuer
from llm.paths import PathText
from llm.pretrained import chat_template_of, tokenizer_of
from vision.opening import LIMITS, ImageLimits


def continue_prompt(
    model: PathText,
    prompt: Verbatim | None = None,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    stop: bool = True,
    average: bool = False,
    *,
    repetition_penalty: float = 1.0,
    num_samples: int = 1,
    prompts: PathText | None = None,
    output: PathText | None = None,
    batch_tokens: int = 16384,
    dtype: Dtype = "auto",
    threads: int | None = None,
    chat: bool = False,
    system: Verbatim | None = None,
    chat_template: PathText = "auto",
    image: Repeated = (),
    image_root: PathText | None = None,
    max_pixels: int = LIMITS.max_pixels,
    max_image_bytes: int = LIMITS.max_bytes,
    num_beams: int = 1,
    length_penalty: float = 1.0,
    early_stopping: bool = False,
) -> None:
    """Print the continuation of a prompt as it is made, or write those of a file of prompts; or talk.

    model: run folder, checkpoint, model folder, or a Hugging Face or Meta folder
    prompt: text to continue; empty = begin a document; left out = read prompts from the terminal, or a line a prompt
        from a pipe. Of an encoder-decoder it is what the encoder reads, and what is written is the answer to it
    max_new_tokens: most tokens to add; a continuation also ends where the model's context does
    temperature: 0 = greedy; 1 = the model's own distribution
    top_k: keep only the k likeliest tokens
    top_p: keep the likeliest tokens up to this probability
    seed: of the random choices; each prompt and sample draws its own from it
    stop: end at the end of the document
    average: use the moving average of the weights, of a run with optim.ema_decay
    repetition_penalty: above 1 makes tokens of prompt and continuation less likely to come again
    num_samples: continuations of each prompt
    prompts: file of prompts: JSONL with `prompt`, whose other columns are kept, or plain text with a line a prompt; a
        row may have `images`, a list of paths
    output: JSONL file for their completions, in order; the same command goes on where a killed one stopped
    batch_tokens: tokens of prompts and continuations computed at once, with --prompts
    dtype: auto = what the run was trained in, or the folder's weights are in, where the device is fast at it: a GPU
        with such units, a CPU with AMX; else fp32
    chat: prompts are what a user says to the model, which answers; in a terminal the conversation is kept; a row of
        --prompts has `messages` or `prompt`
    system: what the system says first, with --chat
    chat_template: with --chat: auto = the one that came with the model, or llama3, llama4, chatml, gemma, mistral, or
        the path of a .jinja file
    image: file of an image, for a model with vision; given again for more. The first `<image>` of the prompt stands
        for the first one; they stand before a prompt without; with --chat they go with what is said first
    image_root: folder in which the images of --prompts lie; default: the folder of that file
    max_pixels: an image of more pixels is refused
    max_image_bytes: an image whose file is larger is refused
    num_beams: continuations that a beam search runs side by side; the best is printed when it is whole
    length_penalty: of beam search: above 1 longer continuations win more often, below 1 shorter ones
    early_stopping: end a beam search once num_beams continuations are finished, though a better one could come
    threads: of a CPU; default: OMP_NUM_THREADS, else the physical cores, or 1 for a model of up to 32M parameters
    """
    try:
        sampling = Sampling(temperature, top_k, top_p, repetition_penalty, seed)
        beams = Beams(num_beams, length_penalty, early_stopping)
        limits = ImageLimits(max_pixels, max_image_bytes)
        beams.check(sampling)
    except ValueError as error:
        raise UserError(f"--{error}") from None
    _check(prompt, max_new_tokens, num_samples, prompts, output, batch_tokens, sampling, beams)
    _check_images(image, image_root, prompt, prompts, chat)
    _check_chat(chat, system, chat_template, num_samples if prompts is None else 1, stop)
    continuer, talks = _open(model, average, dtype, threads, chat_template if chat else None, system, limits)
    if prompts is not None and output is not None:
        settings = BatchSettings(sampling, max_new_tokens, num_samples, stop, batch_tokens, beams)
        root = None if image_root is None else Path(image_root)
        complete_file(continuer, Path(prompts), Path(output), settings, talks, root)
        return
    pictures = [continuer.pictures.look(Path(path).expanduser(), f"--image={path}") for path in image]
    if talks is not None:
        talk = Talk(continuer, talks, sampling, max_new_tokens, pictures, beams)
        if prompt is not None:
            talk.say(prompt, "--prompt")
        else:
            converse(talk.say, HINT, begins=False)
        return
    show_one = partial(show, continuer, sampling=sampling, max_new_tokens=max_new_tokens, stop=stop, beams=beams)
    if prompt is not None:
        show_one(prompt, num_samples=num_samples, pictures=pictures)
    else:
        converse(lambda text, name, place: show_one(text, num_samples=num_samples, name=name, place=place))


def _check(
    prompt: str | None,
    max_new_tokens: int,
    num_samples: int,
    prompts: str | None,
    output: str | None,
    batch_tokens: int,
    sampling: Sampling,
    beams: Beams,
) -> None:
    """UserError where flags are out of range or do not go together."""
    for name, value in (
        ("max_new_tokens", max_new_tokens),
        ("num_samples", num_samples),
        ("batch_tokens", batch_tokens),
    ):
        if value < 1:
            raise UserError(f"--{name}={value} must be at least 1")
    if num_samples > 1 and beams.num_beams > 1:
        raise UserError(
            f"--num_samples={num_samples} does not go with --num_beams={beams.num_beams}: a search gives the best "
            f"continuation, one of each prompt"
        )
    if num_samples > 1 and sampling.temperature == 0:
        raise UserError(
            f"--num_samples={num_samples} needs a temperature above 0; at 0 all continuations of a prompt are the same"
        )
    if prompt is not None and prompts is not None:
        raise UserError("--prompt and --prompts do not go together: one text, or a file of them")
    if prompts is not None and output is None:
        raise UserError("--prompts needs --output, the JSONL file to write")
    if output is not None and prompts is None:
        raise UserError("--output goes with --prompts, a file of prompts; the shell's > keeps what is printed")
    if prompts is not None and not Path(prompts).exists():
        raise UserError(f"--prompts={prompts}: no such file")
    if prompts is not None and output is not None and Path(prompts).resolve() == Path(output).resolve():
        raise UserError(f"--output={output}: is the file of prompts; give another one")


def _check_chat(chat: bool, system: str | None, template: str, num_samples: int, stop: bool) -> None:
    """UserError where flags do not go with talking."""
    for name, given in (("system", system is not None), ("chat_template", template != "auto")):
        if given and not chat:
            raise UserError(f"--{name} goes with --chat")
    if chat and num_samples > 1:
        raise UserError(f"--num_samples={num_samples}: with --chat there is one answer; --prompts can have several")
    if chat and not stop:
        raise UserError("--stop=false does not go with --chat: an answer ends with its end mark")


def _check_images(
    image: Sequence[str], image_root: str | None, prompt: str | None, prompts: str | None, chat: bool
) -> None:
    """UserError where flags about images do not go with the others."""
    if image and prompts is not None:
        raise UserError("--image does not go with --prompts, whose rows have `images`")
    if image and prompt is None and not chat:
        raise UserError("--image goes with --prompt or --chat")
    if image_root is not None and prompts is None:
        raise UserError("--image_root goes with --prompts; --image is a path as it stands")
    if image_root is not None and not Path(image_root).is_dir():
        raise UserError(f"--image_root={image_root}: no such folder")


def _open(
    model: str,
    average: bool,
    dtype: Dtype,
    threads: int | None,
    template: str | None,
    system: str | None,
    limits: ImageLimits,
) -> tuple[Continuer, Chat | None]:
    """The model with its tokenizer; `template` None = it does not talk."""
    where = device()
    tokenizer = tokenizer_of(model)  # read first: it is small, and a damaged one is seen before the weights are read
    talks = None if template is None else Chat(chat_template_of(model, tokenizer, template), system)
    set_threads(threads, 0)
    network = LLM.from_pretrained(model, dtype_for(Path(model), dtype, where), average=average).to(where)
    set_threads(threads, sum(parameter.numel() for parameter in network.parameters()))
    if talks is not None and network.args.encoder_layers:
        raise UserError(f"--chat: {model} is an encoder-decoder, which answers a text and keeps no conversation")
    return Continuer(network, tokenizer, model, None if talks is None else talks.template.end_ids, limits), talks
