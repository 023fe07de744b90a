"""`prompt_tuning` of `adapters`: `prompt_tuning.prompt_tunings.NAME.prompt_embedding.weight` [length, width], in the
encoders of texts that the library has it for.

They stand behind the embeddings' positions and norm: `prompt[at=states]`. With combine = prefix a classifier reads the
first of them where [CLS] was (`leads=true`), with prefix_after_bos it reads [CLS]; as positions are added before, their
order makes no other difference.
"""

from __future__ import annotations

from trimtab.errors import UserError
from trimtab.methods import Prompt
from trimtab.peers.folder import Folder
from trimtab.peers.kinds import Acting, Found, Kind, Model, Written
from trimtab.sites import EmbedsSite

KEY = "prompt_tuning.prompt_tunings.prompt_embedding.weight"
COMBINE = ("prefix", "prefix_after_bos")


def read(folder: Folder, place: Model) -> Found:
    """Raises UserError for models that are no encoders of texts, and for tensors of other sizes."""
    sites = [site for site in place.sites.embeds if site.states is not None]
    if len(sites) != 1:
        raise UserError(f"{folder.path} is prompt tuning, which adapters has for encoders of texts alone")
    leads = folder.choice("combine", "combine", COMBINE) == COMBINE[0]
    found = [tensor for _, _, tensor in folder.take_ending(KEY)]
    if len(found) != 1:
        raise UserError(f"{folder.path} has {len(found)} tensors {KEY}, not one")
    (tokens,) = found
    if tokens.dim() != 2 or tokens.shape[1] != sites[0].width or tokens.shape[0] < 1:
        raise folder.misshapen(KEY, tokens, f"[length, {sites[0].width}]")
    said = folder.number("prompt_length", len(tokens))
    if said != len(tokens):
        raise UserError(f"{folder.path}: the configuration's prompt_length is {said:g}, its tensors have {len(tokens)}")
    classifies = type(place.model).__name__.endswith("ForSequenceClassification")
    method = Prompt(len(tokens), init="random", leads=leads and classifies, at="states")
    return Found(method, {f"{sites[0].key}.tokens": tokens})


def write(form: Acting) -> Written:
    """Raises UserError for virtual tokens in front of the words' embeddings."""
    if form.method.at != "states":
        raise UserError(
            "adapters has virtual tokens behind the embeddings' positions and norm; train with prompt[at=states] for it"
        )
    ((site, part),) = form.of(EmbedsSite).items()
    body = next(path for path, module in form.model.named_modules() if module is site.body)
    config = {
        "architecture": "prompt_tuning",
        "combine": COMBINE[0] if form.method.leads else COMBINE[1],
        "init_weights_seed": None,
        "prompt_init": "random_uniform",
        "prompt_init_text": None,
        "prompt_length": len(part.tokens),
    }
    return Written(config, {f"{body}.{KEY}" if body else KEY: part.tokens.detach()})


KIND = Kind("prompt_tuning", ("prompt",), read, write)
