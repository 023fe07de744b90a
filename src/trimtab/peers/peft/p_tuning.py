"""peft's P_TUNING: what its network makes, `prompt_embeddings` [length, width]; the network is not in the file."""

from __future__ import annotations

from trimtab.errors import UserError
from trimtab.methods import Prompt, PTuning
from trimtab.peers.folder import Folder
from trimtab.peers.kinds import Acting, Found, Kind, Model, Written
from trimtab.peers.peft.tokens import EMBEDDINGS, check_leads, only_part, reads_first, take_tokens, token_config


def read(folder: Folder, place: Model) -> Found:
    """Without its network it is `prompt` where peft reads a class off its first token: P-tuning has no such option."""
    site, tokens = take_tokens(folder, place)
    if reads_first(place.model):
        return Found(Prompt(len(tokens), init="random", leads=True), {f"{site.key}.tokens": tokens})
    method = PTuning(len(tokens), encoder="none", place="front")
    return Found(method, {f"{site.key}.source.tokens": tokens})


def write(form: Acting) -> Written:
    """Raises UserError for pseudo tokens inside a template."""
    _, part = only_part(form)
    if hasattr(part, "first"):
        raise UserError("peft has pseudo tokens in front of the text only; these stand inside a template")
    check_leads(form, False)
    tokens = part.source().detach()
    length, width = tokens.shape
    config = {**token_config(form, length, width), "encoder_hidden_size": width}
    return Written(config, {EMBEDDINGS: tokens})


KIND = Kind("P_TUNING", ("p-tuning",), read, write, prompt_learning=True)
