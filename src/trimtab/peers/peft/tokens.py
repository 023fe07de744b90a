"""`prompt_embeddings` [length, width], which peft's prompt tuning and P-tuning have in common.

peft's sequence classifiers read the class off the first virtual token, because it stands where [CLS] was: `leads` in
our `prompt`. An encoder-decoder has tokens in front of its decoder as well unless num_transformer_submodules is 1.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from trimtab.errors import UserError
from trimtab.peers.folder import Folder
from trimtab.peers.kinds import Acting, Model
from trimtab.sites import EmbedsSite

EMBEDDINGS = "prompt_embeddings"
BOTH = 2
"""num_transformer_submodules of an encoder-decoder whose decoder gets virtual tokens, too."""


def take_tokens(folder: Folder, place: Model) -> tuple[EmbedsSite, torch.Tensor]:
    """Where the virtual tokens go and what they are. Raises UserError for those of a decoder behind an encoder."""
    sites = [site for site in place.sites.embeds if site.embedding is not None]
    if len(sites) != 1:
        raise UserError(f"{folder.path} has virtual tokens, and this model reads no text")
    tokens = folder.take(EMBEDDINGS)
    if tokens.dim() != 2 or tokens.shape[1] != sites[0].width or tokens.shape[0] < 1:
        raise folder.misshapen(EMBEDDINGS, tokens, f"[length, {sites[0].width}]")
    if place.model.config.is_encoder_decoder and folder.number("num_transformer_submodules", BOTH) != 1:
        raise UserError(
            f"{folder.path} has virtual tokens in front of the decoder, too; train with num_transformer_submodules=1"
        )
    return sites[0], tokens


def reads_first(model: PreTrainedModel) -> bool:
    """Whether peft's wrapper of this model reads a class off the first virtual token. Raises UserError for a mean."""
    encoder = not model.config.is_encoder_decoder and type(model).__name__.endswith("ForSequenceClassification")
    if not encoder or model.get_output_embeddings() is not None or hasattr(model, "score"):
        return False
    if getattr(model.config, "classifier_pooling", "cls") == "mean":
        raise UserError("peft's classifiers of this model take a mean that includes the virtual tokens, ours do not")
    return True


def only_part(form: Acting) -> tuple[EmbedsSite, Any]:
    """The site of the virtual tokens, and the part there."""
    ((site, part),) = form.of(EmbedsSite).items()
    return site, part


def token_config(form: Acting, length: int, width: int) -> dict[str, Any]:
    """What peft says of virtual tokens."""
    config: Any = form.model.config
    return {
        "num_virtual_tokens": length,
        "token_dim": width,
        "num_transformer_submodules": 1,
        "num_attention_heads": config.num_attention_heads,
        "num_layers": config.num_hidden_layers,
    }


def check_leads(form: Acting, leads: bool) -> None:
    """Raises UserError where peft would read the class off another position than the adapter does."""
    if reads_first(form.model) != leads:
        raise UserError(
            "peft's classifiers read the class off the first virtual token and not off the text's; "
            "train with prompt[leads=true] to write it for peft"
        )
