"""P-tuning: the network by hand, and pseudo tokens in the places of a template."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import trimtab as tt
from tiny import VOCABULARY, inputs, output, tiny
from trimtab.templates import PSEUDO

FIRST = VOCABULARY
"""The id of the first pseudo token: ids of the vocabulary end before it."""


class Words:
    """A tokenizer that knows pseudo tokens and nothing else."""

    def get_added_vocab(self) -> dict[str, int]:
        return {PSEUDO.format(at): FIRST + at for at in range(9)}


def _lstm(layer: nn.LSTM, states: torch.Tensor) -> torch.Tensor:
    """The bidirectional LSTM of two layers, gate by gate: i, f, g, o."""
    for depth in range(2):
        sides = []
        for side, order in (("", range(len(states))), ("_reverse", reversed(range(len(states))))):
            w, u, b, c = (getattr(layer, f"{name}_l{depth}{side}") for name in _GATES)
            hidden, cell, seen = states.new_zeros(u.shape[1]), states.new_zeros(u.shape[1]), {}
            for at in order:
                i, f, g, o = (w @ states[at] + b + u @ hidden + c).chunk(4)
                cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()
                hidden = o.sigmoid() * cell.tanh()
                seen[at] = hidden
            sides.append(torch.stack([seen[at] for at in range(len(states))]))
        states = torch.cat(sides, dim=1)
    return states


_GATES = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")


@pytest.mark.parametrize("encoder", ["lstm", "mlp"])
def test_the_network_by_hand(encoder: str) -> None:
    torch.manual_seed(0)
    model = tiny("llama", torch.float64)
    adapter = tt.attach(model, f"p-tuning[length=5,encoder={encoder}]")
    for parameter in adapter.parameters():
        parameter.data = 0.3 * torch.randn_like(parameter)
    part = model.trimtab.entries["default"].parts["embeds"]
    network = part.source
    states = _lstm(network.lstm, network.tokens) if encoder == "lstm" else network.tokens
    for layer in network.inner:
        states = (states @ layer.weight.T + layer.bias).clamp(min=0)
    states = network.start + states @ network.last.weight.T + network.last.bias
    assert network.start.norm(dim=1).min() > 0
    assert torch.allclose(part(), states, atol=1e-12)
    assert len(network.inner) == (1 if encoder == "lstm" else 2)


@pytest.mark.parametrize("encoder", ["lstm", "mlp"])
def test_every_tensor_of_the_network_learns(encoder: str) -> None:
    """Those in front of the last projection from the second step on: it starts at zero."""
    model = tiny("llama")
    adapter = tt.attach(model, f"p-tuning[length=4,encoder={encoder}]")
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-3)
    before = [parameter.detach().clone() for parameter in adapter.parameters()]
    for _ in range(2):
        optimizer.zero_grad()
        output(model, inputs("llama")).pow(2).mean().backward()
        optimizer.step()
    assert not any(torch.equal(one, other) for one, other in zip(before, adapter.parameters(), strict=True))


def test_a_random_start_is_the_networks_own() -> None:
    model = tiny("llama")
    tt.attach(model, "p-tuning[length=4,init=random]")
    network = model.trimtab.entries["default"].parts["embeds"].source
    assert not network.start.any() and network.last.weight.any()


@pytest.mark.parametrize("encoder", ["lstm", "mlp", "none"])
def test_it_starts_at_embeddings_of_real_tokens(encoder: str) -> None:
    torch.manual_seed(0)
    model = tiny("gpt2")
    tt.attach(model, f"p-tuning[length=4,encoder={encoder}]")
    tokens = model.trimtab.entries["default"].parts["embeds"]()
    table = model.transformer.wte.weight
    nearest = torch.cdist(tokens.detach(), table).min(dim=1).values
    assert nearest.max() < 1e-3 * table.norm(dim=1).mean()


def test_the_network_runs_once_a_forward() -> None:
    model = tiny("llama")
    tt.attach(model, "p-tuning[length=4,encoder=lstm]")
    calls = []
    model.trimtab.entries["default"].parts["embeds"].source.lstm.register_forward_hook(lambda *_: calls.append(1))
    output(model, inputs("llama", batch=3))
    assert len(calls) == 1


def _with_pseudo(family: str) -> dict[str, torch.Tensor]:
    """A batch whose rows have the pseudo tokens 0, 1, 2 at different places."""
    batch = inputs(family, batch=2, length=8)
    ids = batch["input_ids"].clone()
    ids[0, [1, 2, 6]] = torch.tensor([FIRST, FIRST + 1, FIRST + 2])
    ids[1, [0, 3, 4]] = torch.tensor([FIRST, FIRST + 1, FIRST + 2])
    return {**batch, "input_ids": ids}


def _by_hand(model: Any, batch: dict[str, torch.Tensor], tokens: torch.Tensor) -> torch.Tensor:
    """The base model's output for embeddings in which the pseudo tokens' rows were put by hand."""
    ids = batch["input_ids"]
    embeds = model.get_input_embeddings()(ids.clamp(max=VOCABULARY - 1)).clone()
    for row, column in (ids >= FIRST).nonzero().tolist():
        embeds[row, column] = tokens[ids[row, column] - FIRST]
    rest = {key: value for key, value in batch.items() if key != "input_ids"}
    with next(iter(tt.adapters(model).values())).disabled():
        return output(model, {**rest, "inputs_embeds": embeds})


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "opt", "bloom", "bert", "roberta", "modernbert", "t5"])
def test_in_a_template_the_pseudo_tokens_take_their_places(family: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, batch = tiny(family), _with_pseudo(family)
    adapter = tt.attach(model, "p-tuning[length=3,place=template]", tokenizer=Words())
    (part,) = _embeds(model)
    with torch.no_grad():
        found = output(model, batch)
        assert torch.allclose(found, _by_hand(model, batch, part()), atol=1e-5)
        plain = inputs(family)
        with adapter.disabled():
            base = output(model, plain)
        assert torch.allclose(output(model, plain), base, atol=1e-6)  # no pseudo token, no difference
        adapter.save(tmp_path)
        fresh = tiny(family)
        tt.load(fresh, tmp_path)
        assert torch.allclose(output(fresh, batch), found, atol=1e-5)
        assert [name for name, _ in _embeds(fresh)[0].named_parameters()] == ["source.tokens"]


def test_unused_rows_behind_the_pseudo_tokens_stay_what_they_are() -> None:
    """T5's embedding has more rows than its tokenizer has tokens: the next ids are the model's own."""
    model, batch = tiny("llama"), inputs("llama")
    first = VOCABULARY - 8
    batch["input_ids"] = batch["input_ids"] % first
    batch["input_ids"][:, 4] = first + 3  # three pseudo tokens end before it

    class Fewer:
        def get_added_vocab(self) -> dict[str, int]:
            return {PSEUDO.format(at): first + at for at in range(3)}

    adapter = tt.attach(model, "p-tuning[length=3,place=template]", tokenizer=Fewer())
    with torch.no_grad():
        found = output(model, batch)
        batch["input_ids"][:, 5] = first
        assert not torch.allclose(output(model, batch), found)
        batch["input_ids"][:, 5] = inputs("llama")["input_ids"][:, 5] % first
        with adapter.disabled():
            assert torch.allclose(output(model, batch), found, atol=1e-6)


def _embeds(model: Any) -> list[Any]:
    """The part at the embeddings; another one is the task head's."""
    return [part for key, part in model.trimtab.entries["default"].parts.items() if key.endswith("embeds")]


def test_mistakes() -> None:
    for method, sentence in (
        ("p-tuning[length=0]", "length=0"),
        ("p-tuning[encoder=gru]", "gru"),
        ("p-tuning[place=template,length=2]", "reads no text"),
    ):
        with pytest.raises(tt.UserError, match=sentence):
            tt.attach(tiny("vit"), method)
    with pytest.raises(tt.UserError, match="template with pseudo tokens"):
        tt.attach(tiny("llama"), "p-tuning[place=template,length=10]", tokenizer=Words())
