"""peft's PROMPT_TUNING: `prompt_embeddings` [length, width]."""

from __future__ import annotations

from trimtab.errors import UserError
from trimtab.methods import Prompt
from trimtab.peers.folder import Folder
from trimtab.peers.kinds import Acting, Found, Kind, Model, Written
from trimtab.peers.peft.tokens import EMBEDDINGS, check_leads, only_part, reads_first, take_tokens, token_config


def read(folder: Folder, place: Model) -> Found:
    """Raises UserError for tokens in front of a decoder behind an encoder."""
    site, tokens = take_tokens(folder, place)
    method = Prompt(len(tokens), init="random", leads=reads_first(place.model))
    return Found(method, {f"{site.key}.tokens": tokens})


def write(form: Acting) -> Written:
    """Raises UserError where peft would read the class elsewhere."""
    _, part = only_part(form)
    if form.method.at != "words":
        raise UserError(
            "peft has virtual tokens in front of the words' embeddings alone, and this prompt has at=states"
        )
    check_leads(form, form.method.leads)
    length, width = part.tokens.shape
    config = {**token_config(form, length, width), "prompt_tuning_init": "RANDOM"}
    return Written(config, {EMBEDDINGS: part.tokens.detach()})


KIND = Kind("PROMPT_TUNING", ("prompt",), read, write, prompt_learning=True)
