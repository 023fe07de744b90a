"""Where a base model comes from and which of the five kinds it is. Knows transformers' loaders and file layouts;
refuses to know methods, what tasks do and training.

A source is a hub id, a local folder, `pkg:NAME/path` inside an installed package, or a GGUF file (also on the hub:
`owner/name/file.gguf`). Nothing that exists locally touches the network.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES as PICTURES
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES as MASKED
from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES as MULTIPLE_CHOICE
from transformers.models.auto.modeling_auto import MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES as QUESTIONS
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES as SEQUENCES
from transformers.models.auto.modeling_auto import MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES as TOKENS

from trimtab.arch import FAMILIES
from trimtab.data import resolve
from trimtab.errors import UserError, unknown
from trimtab.tasks import TASKS, Task, task_class
from trimtab.templates import has_mask

Kind = Literal["causal", "seq2seq", "encoder", "masked", "vision"]
DTYPES = ("float32", "bfloat16", "float16", "auto")
CONVERTED = "gguf-1"
"""The cache's sub-folder; the number grows when converted files would come out differently."""
_CLASSES = {
    "causal": transformers.AutoModelForCausalLM,
    "seq2seq": transformers.AutoModelForSeq2SeqLM,
    "masked": transformers.AutoModelForMaskedLM,
}
KIND_NAMES = {
    "causal": "a causal language model",
    "seq2seq": "an encoder-decoder",
    "encoder": "an encoder",
    "vision": "a vision model",
}
_TOWER = "clip_vision_model"
"""CLIP's vision part alone, which transformers has no head for; it gets that of a whole CLIP."""


@dataclass(frozen=True)
class Head:
    """What an encoder or a vision model gets on top."""

    loader: Any
    """The class of transformers that loads it."""
    families: Any
    """The model types that have one."""
    options: Mapping[str, Any]
    """What its configuration says besides the labels."""


HEADS = {
    "classification": Head(transformers.AutoModelForSequenceClassification, SEQUENCES, {}),
    "regression": Head(
        transformers.AutoModelForSequenceClassification, SEQUENCES, {"num_labels": 1, "problem_type": "regression"}
    ),
    "tags": Head(transformers.AutoModelForTokenClassification, TOKENS, {}),
    "spans": Head(transformers.AutoModelForQuestionAnswering, QUESTIONS, {"num_labels": 2}),
    "choices": Head(transformers.AutoModelForMultipleChoice, MULTIPLE_CHOICE, {"num_labels": 1}),
    "pictures": Head(transformers.AutoModelForImageClassification, {*PICTURES, _TOWER}, {}),
}


def load_model(
    source: str,
    kind: Kind,
    *,
    head: str = "classification",
    labels: Sequence[str] = (),
    dtype: str = "float32",
    device: str | None = None,
    seed: int = 0,
) -> PreTrainedModel:
    """The base model of one kind, in eval mode.

    An encoder or a vision model gets a head (of HEADS), with a class for each of `labels`.

    What the files do not have (a head that fits the labels, BERT's pooler) is made anew, the same for the same `seed`.
    Raises UserError if there is no such model, and for a masked language model whose head the files do not have.
    """
    if dtype not in DTYPES:
        raise unknown("dtype", dtype, DTYPES)
    options: dict[str, Any] = {"dtype": dtype if dtype == "auto" else getattr(torch, dtype)}
    headed = kind in ("encoder", "vision")
    if headed:
        options |= {"ignore_mismatched_sizes": True, **HEADS[head].options}
        if labels:
            names = dict(enumerate(labels))
            options |= {"num_labels": len(names), "id2label": names}
            options |= {"label2id": {name: index for index, name in names.items()}}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        loader = HEADS[head].loader if headed else _CLASSES[kind]
        if kind == "vision" and load_config(source).model_type == _TOWER:
            loader = _Tower
        model, found = _load(loader, source, output_loading_info=True, **options)
    if kind == "masked":
        _check_mask_head(source, model, found["missing_keys"])
    model.config._name_or_path = portable(source)  # adapters note where their base came from
    return model.to(device) if device else model


class _Tower:
    """Loads CLIP's vision part into the model that transformers puts a head on."""

    @staticmethod
    def from_pretrained(path: str, output_loading_info: bool, ignore_mismatched_sizes: bool, **options: Any) -> Any:
        """The model and what its files did not have, as transformers' loaders give them."""
        place = {name: options.pop(name) for name in ("dtype", "local_files_only")}
        loader: Any = transformers.CLIPVisionModel
        tower, found = loader.from_pretrained(path, output_loading_info=True, **place)
        config = transformers.CLIPConfig(vision_config=tower.config.to_dict(), **options)
        model = transformers.CLIPForImageClassification(config).to(tower.dtype).eval()
        model.vision_model = tower
        return model, found


def _check_mask_head(source: str, model: PreTrainedModel, missing: Iterable[str]) -> None:
    """Raises UserError where the head was made anew: its words would be random."""
    head = sorted(key for key in missing if not key.startswith(f"{model.base_model_prefix}."))
    if head:
        raise UserError(
            f"the model {source!r} cannot say which word stands at {{mask}}: its files have no masked-language-model "
            f"head ({head[0]} is missing); take a model that has one, or leave {{mask}} out"
        )


def load_for(task: Task, source: str, kind: Kind, **options: Any) -> PreTrainedModel:
    """`load_model` with the head and the labels of a task."""
    return load_model(source, kind, head=task.head or "", labels=getattr(task, "labels", ()), **options)


def load_tokenizer(source: str) -> PreTrainedTokenizerBase:
    """The model's tokenizer; one without a padding token pads with its end token, so the embeddings keep their size."""
    tokenizer = _load(AutoTokenizer, source)
    if tokenizer.pad_token is None:
        spare = tokenizer.eos_token or tokenizer.unk_token
        if spare is None:
            raise UserError(f"the tokenizer of {source!r} has no token to pad with (neither pad, end nor unknown)")
        tokenizer.pad_token = spare
    return tokenizer


def load_config(source: str) -> PreTrainedConfig:
    """The model's configuration. Raises UserError if there is no such model."""
    return _load(AutoConfig, source)


def load_body(source: str) -> PreTrainedModel:
    """A model without a head, in float32 and in eval mode. Raises UserError if there is no such model."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # what the files lack, such as a pooler, is the same every time
        with quiet():  # about heads that are left out and poolers that are made
            return _load(transformers.AutoModel, source, dtype=torch.float32)


def empty_body(config: PreTrainedConfig, device: str = "cpu") -> PreTrainedModel:
    """A model without a head like that of a configuration, in float32; its weights are to be loaded."""
    config.dtype = torch.float32
    with torch.random.fork_rng(devices=[]), torch.device(device):
        return transformers.AutoModel.from_config(config).eval()


def config_of(said: Any) -> PreTrainedConfig:
    """The configuration that an adapter's folder holds. Raises UserError where it is none."""
    try:
        own = dict(said)
        return AutoConfig.for_model(own.pop("model_type"), **own)
    except (KeyError, TypeError, ValueError, AttributeError, StrictDataclassError) as error:
        raise UserError(f"the small model's configuration is broken: {error}") from error


def load_vision_encoder(source: str) -> PreTrainedModel:
    """A frozen vision model without a head, in eval mode; of a model of pictures and texts the half that sees.

    Raises UserError for a model that reads no pictures.
    """
    model: Any = load_body(source)
    model = getattr(model, "vision_model", model)
    if model.main_input_name != "pixel_values":
        raise UserError(
            f"{source!r} ({model.config.model_type}) reads no pictures; "
            "image= takes a vision model, such as vit, dinov2 or clip"
        )
    return model.requires_grad_(False).eval()


def kind_of(source: str, task: str, template: str | None = None) -> Kind:
    """The kind of model that the task of this name gets from this source, by its configuration.

    Encoder-decoders are "seq2seq"; models that classify pictures are "vision"; a model saved as a causal language
    model, or whose type is one and has no masked language model, is "causal"; every other is "encoder", or "masked" for
    a template with a mask. Raises UserError for
    a model that cannot do the task, and for a mask that the model or the task has no use for.
    """
    config = load_config(source)
    kind = model_kind(config)
    wanted = task_class(task, kind)
    if has_mask(template):
        return _masked(source, config, kind, task)
    headed = kind in ("encoder", "vision")
    if kind not in wanted.kinds or (headed and config.model_type not in _families(wanted)):
        raise UserError(
            f"{source!r} ({config.model_type}) is {KIND_NAMES[kind]} and cannot {task}; models that can: {_able(task)}"
        )
    return kind


def _masked(source: str, config: PreTrainedConfig, kind: Kind, task: str) -> Kind:
    if kind != "encoder" or config.model_type not in MASKED:
        able = [name for name in FAMILIES if name in MASKED and _is_encoder(name)]
        raise UserError(
            f"{{mask}} needs a masked language model ({', '.join(able)}); "
            f"{source!r} ({config.model_type}) is {KIND_NAMES[kind]}{' without one' if kind == 'encoder' else ''}"
        )
    if "masked" not in task_class(task).kinds:
        able = [name for name, other in TASKS.items() if "masked" in other.kinds]
        raise UserError(f"{{mask}} in a template belongs to the task {', '.join(map(repr, able))}, not to {task!r}")
    return "masked"


def _families(task: type[Task]) -> Any:
    """The types of encoders that have a head for a task."""
    return HEADS[task.head].families if task.head else ()


def _able(name: str) -> str:
    """The models that can do a task: kinds, and of those with a head the families that adapters can be attached to."""
    task = task_class(name)
    able = [f"{kind} models" for kind in task.kinds if kind not in ("encoder", "masked")]
    for kind, called in (("encoder", "encoders"), ("vision", "vision models")):
        task = task_class(name, kind)
        found = [one for one in FAMILIES if one in _families(task) and _is_of(kind, one)] if kind in task.kinds else []
        able += [f"{called} ({', '.join(found)})"] if found else []
    return ", ".join(able)


def _is_of(kind: str, model_type: str) -> bool:
    return usual_kind(model_type) == kind


def usual_kind(model_type: str) -> Kind:
    """The kind that models of a type usually are."""
    return model_kind(AutoConfig.for_model(model_type))


def _is_encoder(model_type: str) -> bool:
    return _is_of("encoder", model_type)


def model_kind(config: PreTrainedConfig) -> Kind:
    """The kind of model that a configuration was saved as, or that its type usually is."""
    if config.is_encoder_decoder:
        return "seq2seq"
    saved_as = set(config.architectures or ())
    if saved_as & _class_names(CAUSAL) or any(name.endswith("ForCausalLM") for name in saved_as):
        return "causal"
    if any("ForSequenceClassification" in name or "ForMaskedLM" in name for name in saved_as):
        return "encoder"
    known = config.model_type
    if (known in PICTURES or known == _TOWER) and known not in (*SEQUENCES, *MASKED):
        return "vision"
    return "causal" if known in CAUSAL and known not in MASKED else "encoder"


def _class_names(mapping: Any) -> set[str]:
    return {name for names in mapping.values() for name in ([names] if isinstance(names, str) else names)}


def portable(source: str) -> str:
    """The source as it may be noted down: a local path made absolute, anything else as the user gave it."""
    path = os.path.expanduser(source)
    return os.path.abspath(path) if os.path.exists(path) else source  # links stay: in caches they carry the file's name


def same_source(one: str, other: str) -> bool:
    """Whether two sources (of models or data) are the same file, folder or id, however they are spelled."""
    return os.path.realpath(portable(resolve(one))) == os.path.realpath(portable(resolve(other)))


@contextmanager
def quiet() -> Iterator[None]:
    """Inside the block transformers shows neither warnings nor progress bars (the command line has its own)."""
    log = transformers.utils.logging
    level, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(level)
        if bars:
            log.enable_progress_bar()


# Where the files are


@dataclass(frozen=True)
class Place:
    """What transformers' loaders are given."""

    path: str
    """A folder, or a hub id."""
    local: bool
    """Whether it is a folder, so that no network may be touched."""


def locate(source: str) -> Place:
    """The folder or hub id behind a source; a GGUF file is converted on first use. Raises UserError."""
    path = Path(resolve(source)).expanduser()
    if path.is_dir():
        return Place(str(_model_folder(source, path)), local=True)
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise UserError(f"{source!r} is a file; a model is a folder with a config.json, or a .gguf file")
        return Place(str(from_gguf(path)), local=True)
    if source.startswith((".", "/", "~", "pkg:")) or (os.sep != "/" and os.sep in source):
        raise UserError(f"the model {source!r} does not exist")
    if source.lower().endswith(".gguf"):
        return Place(str(from_gguf(_download(source))), local=True)
    return Place(source, local=False)


def _model_folder(source: str, folder: Path) -> Path:
    if (folder / "config.json").is_file():
        return folder
    files = sorted(folder.glob("*.gguf"))
    if len(files) == 1:
        return from_gguf(files[0])
    if files:
        raise UserError(f"{source!r} has several models, name one: {', '.join(file.name for file in files)}")
    raise UserError(f"{source!r} is not a model folder: it has neither a config.json nor a .gguf file")


def _download(source: str) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    owner, _, rest = source.partition("/")
    name, _, file = rest.partition("/")
    if not file:
        raise UserError(f"the file {source!r} does not exist (on the hub a GGUF file is owner/name/file.gguf)")
    try:
        return Path(hf_hub_download(f"{owner}/{name}", file))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise _not_found(source, error) from error


def _load(loader: Any, source: str, **options: Any) -> Any:
    return load_from(loader, locate(source), source, **options)


def load_from(loader: Any, place: Place, source: str, **options: Any) -> Any:
    """What one of transformers' loaders makes of a place's files. Raises UserError, naming `source`, if it cannot."""
    try:
        return loader.from_pretrained(place.path, local_files_only=place.local, **options)
    except (OSError, ValueError, SafetensorError) as error:  # missing files, unknown model types, damaged weights
        raise _not_found(source, error) from error


def _not_found(source: str, error: Exception) -> UserError:
    reason = str(error).strip().partition("\n")[0].rstrip(".")
    return UserError(f"the model {source!r} does not load: {reason}")


# GGUF


def from_gguf(file: Path) -> Path:
    """A model folder (float32 safetensors and tokenizer) with what the GGUF file holds, converted once into the cache.

    transformers reads GGUF files about thirty times slower than safetensors, so the result is kept; the folder is
    named by the file's path, size and time, and appears whole or not at all.
    """
    state = file.stat()
    mark = hashlib.sha256(f"{file.resolve()}\n{state.st_size}\n{state.st_mtime_ns}".encode()).hexdigest()[:16]
    target = cache_folder() / CONVERTED / f"{file.stem}-{mark}"
    if not target.is_dir():
        target.parent.mkdir(parents=True, exist_ok=True)
        building = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{file.stem}-"))
        try:
            _convert(file, building)
            _rename(building, target)
        finally:
            shutil.rmtree(building, ignore_errors=True)
    return target


def cache_folder() -> Path:
    """Where converted models are kept: $XDG_CACHE_HOME/trimtab, or ~/.cache/trimtab."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "trimtab"


def _convert(file: Path, folder: Path) -> None:
    options: dict[str, Any] = {"gguf_file": file.name, "local_files_only": True}
    try:
        model = _read_gguf(file, options)
        tokenizer = AutoTokenizer.from_pretrained(file.parent, **options)
    except (OSError, ValueError, KeyError, NotImplementedError) as error:
        raise _not_found(str(file), error) from error
    del model.config.quantization_config  # the weights are plain now, and saving a quantised model is refused
    model.is_quantized, model.hf_quantizer = False, None
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _read_gguf(file: Path, options: dict[str, Any]) -> Any:
    options = {**options, "dtype": torch.float32}
    try:  # reading the configuration first would cost a third of the whole conversion
        return _CLASSES["causal"].from_pretrained(file.parent, **options)
    except ValueError as error:
        if "Unrecognized configuration class" not in str(error):
            raise
        return _CLASSES["seq2seq"].from_pretrained(file.parent, **options)


def _rename(building: Path, target: Path) -> None:
    try:
        building.rename(target)
    except OSError:
        if not target.is_dir():  # otherwise another process was first, and its copy is as good
            raise
