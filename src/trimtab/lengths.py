"""How many tokens a row may have. Knows position tables and virtual tokens; refuses to know texts and tensors."""

from __future__ import annotations

from typing import Any

from trimtab.arch import FAMILIES
from trimtab.errors import UserError

USUAL = 512
"""Tokens that a row may have where nobody says otherwise and the model has the positions."""
_UNBOUNDED = ("rope_parameters", "rope_theta", "rotary_dim", "relative_attention_num_buckets", "alibi")
"""What a configuration has whose positions are rotary, relative or linear biases: any length can be computed."""


def position_limit(config: Any) -> int | None:
    """The tokens that the model's table of learned positions has rows for; None for a model without such a table."""
    if any(getattr(config, name, None) for name in _UNBOUNDED):
        return None
    size = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
    if size is not None and _padded(config):
        return size - (config.pad_token_id or 0) - 1
    return size


def _padded(config: Any) -> bool:
    """Whether positions are numbered from behind the padding index, as RoBERTa does."""
    family = FAMILIES.get(config.model_type)
    return family is not None and any(stack.positions == "padded" for stack in family.stacks)


def virtual_tokens(method: Any, config: Any) -> int:
    """The positions that a method's virtual tokens or prefix take in front of a text; none without a method."""
    family = FAMILIES.get(config.model_type)
    if family is None or not any(stack.insert in ("shared", "tokens") for stack in family.stacks):
        return 0
    members = _members(method)
    shifts = any(stack.shift for stack in family.stacks)
    taking = [member for member in members if "embeds" in member.kinds or (shifts and _shifts(member))]
    return sum(getattr(member, "in_front", member.length) for member in taking)


def _members(method: Any) -> tuple[Any, ...]:
    return getattr(method, "methods", (method,) if method else ())


def _shifts(method: Any) -> bool:
    """Whether a method's prefix moves the text's positions up where the family does so."""
    return bool(getattr(method, "moves_text", False))


def room(method: Any, config: Any) -> int | None:
    """The tokens of text that fit beside the method's virtual tokens; None for any number."""
    limit = position_limit(config)
    return None if limit is None else max(0, limit - virtual_tokens(method, config))


def prompt_length(method: Any, config: Any, longest: int, new_tokens: int) -> int:
    """The tokens that a prompt may have so that `new_tokens` fit behind it, or half of a short table."""
    most = room(method, config)
    if most is None or config.is_encoder_decoder:  # a decoder numbers its own text
        return longest
    return max(1, min(longest, max(most - new_tokens, most // 2)))


def new_tokens(method: Any, config: Any, prompt: int, wanted: int) -> int:
    """How many of the wanted tokens can follow a prompt of so many; always one, whose own position is not needed."""
    most = room(method, config)
    return wanted if most is None else max(1, min(wanted, most - (1 if config.is_encoder_decoder else prompt)))


def fitting_length(method: Any, config: Any, wanted: int | None) -> int:
    """The longest row, in tokens: as wanted, or by default what fits of the usual 512.

    Raises UserError where more is wanted than fits, and where the virtual tokens leave nothing.
    """
    most, inside = room(method, config), sum(getattr(member, "inside", 0) for member in _members(method))
    if most is None:
        _check_trained(method, config)
        if (longest := wanted or USUAL) <= inside:
            raise UserError(
                f"the template's {inside} pseudo tokens leave no room for the text in max_length={longest}; "
                "raise --max-length"
            )
        return longest
    taken = virtual_tokens(method, config)
    beside = f" and the method's virtual tokens take {taken}" if taken else ""
    if most <= inside:
        taking = f"{beside} and the template's pseudo tokens {inside}" if inside else beside
        raise UserError(f"this model has {position_limit(config)} positions{taking}, which leaves none for the text")
    if wanted is not None and wanted > most:
        raise UserError(
            f"max_length={wanted} is too long: this model has {position_limit(config)} positions{beside}; "
            f"allowed is at most {most}"
        )
    return wanted or min(USUAL, most)


def _check_trained(method: Any, config: Any) -> None:
    """Raises UserError where virtual tokens alone take all positions that a model without a table was trained with."""
    known, taken = getattr(config, "max_position_embeddings", None), virtual_tokens(method, config)
    if known is not None and taken >= known:
        raise UserError(
            f"the method's virtual tokens take {taken} of the {known} positions that this model was trained with, "
            f"which leaves none for the text; allowed are at most {known - 1}"
        )
