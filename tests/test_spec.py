"""Method strings: parsing, its inverse, mappings, and what a mistake says."""

from __future__ import annotations

import random
from dataclasses import dataclass, fields
from typing import ClassVar, Literal

import pytest
import yaml

from trimtab.errors import UserError
from trimtab.methods import METHODS, Union
from trimtab.methods.spec import format_method, method_from_dict, method_to_dict, parse_method, split_methods


@dataclass(frozen=True)
class Everything:
    """One field of every type that a method may have."""

    r: int = 8
    alpha: float = 16.0
    stable: bool = False
    text: str = "start"
    layers: str | None = None
    targets: tuple[str, ...] = ("q", "v")
    sizes: tuple[int, ...] | None = None
    kind: Literal["gate", "scale"] = "gate"
    share: int | float | None = None

    name: ClassVar[str] = "everything"

    def __post_init__(self) -> None:
        if self.r < 1:
            raise ValueError(f"r={self.r} must be at least 1")


@dataclass(frozen=True)
class Needs:
    """A method without defaults."""

    length: int

    name: ClassVar[str] = "needs"


REGISTRY = {"everything": Everything, "needs": Needs}


@pytest.mark.parametrize(
    ("text", "method"),
    [
        ("everything", Everything()),
        ("everything[]", Everything()),
        (" Everything [ r = 4 ] ", Everything(r=4)),
        ("everything[r=4,alpha=1e-3,stable=yes]", Everything(r=4, alpha=1e-3, stable=True)),
        ("everything[layers=-10:]", Everything(layers="-10:")),
        ("everything[layers=0,3,-1,r=2]", Everything(layers="0,3,-1", r=2)),
        ("everything[layers=none]", Everything()),
        ("everything[layers='none']", Everything(layers="none")),
        ("everything[targets=q]", Everything(targets=("q",))),
        ("everything[targets=q,v,down,r=2]", Everything(targets=("q", "v", "down"), r=2)),
        ("everything[targets=]", Everything(targets=())),
        ("everything[targets='a,b',c]", Everything(targets=("a,b", "c"))),
        ("everything[sizes=1,2]", Everything(sizes=(1, 2))),
        ("everything[sizes=none]", Everything()),
        ("everything[kind=Scale]", Everything(kind="scale")),
        ("everything[share=3]", Everything(share=3)),
        ("everything[share=0.5]", Everything(share=0.5)),
        ("everything[text='Classify, please']", Everything(text="Classify, please")),
        ("everything[text=Classify, please]", Everything(text="Classify, please")),
        ('everything[text="a|b[c]=d"]', Everything(text="a|b[c]=d")),
        ("everything[text=[MASK] is]", Everything(text="[MASK] is")),
        ("everything[text=don't]", Everything(text="don't")),
        (r"everything[text='don\'t\nstop\\']", Everything(text="don't\nstop\\")),
        ("everything[text=给这条评论分类]", Everything(text="给这条评论分类")),
        ("needs[length=3]", Needs(3)),
    ],
)
def test_a_string_gives_the_method(text, method):
    assert parse_method(text, REGISTRY) == method
    assert parse_method(format_method(method), REGISTRY) == method
    assert method_from_dict(method_to_dict(method), REGISTRY) == method


def test_values_have_the_types_of_their_fields():
    method = parse_method("everything[alpha=3,share=3,r=4]", REGISTRY)
    assert [type(value) for value in (method.alpha, method.share, method.r)] == [float, int, int]


def test_the_text_leaves_defaults_out_and_is_readable():
    assert format_method(Everything()) == "everything"
    assert format_method(Everything(r=2, layers="-10:", targets=("q",))) == "everything[r=2,layers=-10:,targets=q]"
    assert format_method(Everything(layers="0,3")) == "everything[layers=0,3]"


def test_a_union_is_methods_joined_by_bars():
    method = parse_method("prompt[length=4]|lora[r=2,targets=q,v]")
    assert isinstance(method, Union)
    assert [type(member) for member in method.methods] == [METHODS["prompt"], METHODS["lora"]]
    assert parse_method(format_method(method)) == method
    as_dict = method_to_dict(method)
    assert as_dict["name"] == "union"
    assert [member["name"] for member in as_dict["methods"]] == ["prompt", "lora"]
    assert parse_method(as_dict) == method
    assert parse_method({"name": "union", "methods": ["prompt[length=4]", "lora[r=2]"]}) == method


@pytest.mark.parametrize("name", sorted(METHODS))
def test_every_registered_method_round_trips(name):
    method = parse_method(name)
    assert type(method) is METHODS[name]
    assert parse_method(format_method(method)) == method
    assert method_from_dict(method_to_dict(method)) == method


def test_a_yaml_mapping_gives_the_method():
    text = '{name: everything, r: 4, alpha: 1e-3, targets: [q, k], layers: "-10:", stable: true, sizes: null, share: 2}'
    method = parse_method(yaml.safe_load(text), REGISTRY)
    assert method == Everything(r=4, alpha=1e-3, targets=("q", "k"), layers="-10:", stable=True, share=2)
    assert parse_method({"name": "everything", "targets": "q, k"}, REGISTRY) == Everything(targets=("q", "k"))


def test_a_method_passes_through():
    method = Everything(r=3)
    assert parse_method(method, REGISTRY) is method


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("everythin", ["method 'everythin'", "did you mean 'everything'", "needs"]),
        ("everything[rr=4]", ["field of everything 'rr'", "did you mean 'r'", "alpha"]),
        ("everything[r=abc]", ["field 'r'", "a whole number", "'abc'"]),
        ("everything[r=8,]", ["field 'r'", "'8,'"]),
        (f"everything[r={'9' * 5000}]", ["a whole number"]),
        ("everything[r=1.5]", ["a whole number", "'1.5'"]),
        ("everything[r=true]", ["a whole number"]),
        ("everything[alpha=nan]", ["a number", "'nan'"]),
        ("everything[stable=maybe]", ["true or false", "'maybe'"]),
        ("everything[kind=other]", ["one of gate, scale", "'other'"]),
        ("everything[targets=q,,v]", ["a list", "separated by commas"]),
        ("everything[sizes=1,x]", ["a list", "a whole number", "or none"]),
        ("everything[r=0]", ["r=0 must be at least 1"]),
        ("everything[r=4,r=5]", ["'r'", "twice"]),
        ("everything[4]", ["'4'", "field=value"]),
        ("everything[r=4", ["never closed"]),
        ("everything]", ["never opened"]),
        ("everything[r=4]x", ["'x' follows"]),
        ("everything[text='a]", ["quote", "never closed"]),
        ("everything[text='a'b]", ["'b' follows the closing quote"]),
        ("", ["name is missing"]),
        ("everything|", ["name is missing"]),
        ("needs", ["needs length"]),
        (8, ["a string such as"]),
        ({"r": 8}, ["needs a name"]),
        ({"name": "everything", "r": "x"}, ["a whole number", "'x'"]),
        ({"name": "everything", "r": True}, ["a whole number", "True"]),
        ({"name": "everything", "targets": 3}, ["a list", "3"]),
        ({"name": "union", "methods": []}, ["list of methods"]),
        ({"name": "union", "methods": ["lora"], "r": 3}, ["nothing else"]),
    ],
)
def test_a_mistake_is_named(spec, words):
    with pytest.raises(UserError) as caught:
        parse_method(spec, REGISTRY)
    message = str(caught.value)
    assert "\n" not in message
    assert [word for word in words if word not in message] == []


def test_all_mistakes_of_a_method_come_at_once():
    with pytest.raises(UserError) as caught:
        parse_method("everything[r=x,stable=y,zz=1]|needs", REGISTRY)
    assert len(str(caught.value).splitlines()) == 4


def test_lists_of_methods_split_outside_brackets():
    assert split_methods("prompt, lora[r=8,alpha=16] ,a|b[text='],']") == [
        "prompt",
        "lora[r=8,alpha=16]",
        "a|b[text='],']",
    ]
    with pytest.raises(UserError, match="empty place"):
        split_methods("prompt,,lora")


def test_no_string_gives_anything_but_a_method_or_a_user_error():
    rng = random.Random(0)
    pieces = [
        *"[]|,='\"\\ \n:-.0e",
        "everything",
        "needs",
        "r",
        "text",
        "targets",
        "none",
        "你好",
        "\ud800",
        "\0",
    ]
    methods = 0
    for _ in range(8_000):
        text = "".join(rng.choice(pieces) for _ in range(rng.randrange(9)))
        try:
            method = parse_method(text, REGISTRY)
        except UserError:
            continue
        methods += 1
        assert parse_method(format_method(method), REGISTRY) == method
    assert methods > 10


def test_random_methods_round_trip():
    rng = random.Random(1)
    letters = [*"abz019 _-:./,|[]='\"\\\n\t\r", "none", "None", "你", "\u2028", "\x7f", ""]

    def text() -> str:
        return "".join(rng.choice(letters) for _ in range(rng.randrange(6)))

    for _ in range(2_000):
        method = Everything(
            r=rng.randrange(1, 99),
            alpha=rng.uniform(-1e9, 1e9) * 10 ** rng.randrange(-20, 20),
            stable=rng.random() < 0.5,
            text=text(),
            layers=rng.choice([None, text()]),
            targets=tuple(text() for _ in range(rng.randrange(4))),
            sizes=rng.choice([None, (), (1,), (2, -3)]),
            kind=rng.choice(["gate", "scale"]),
            share=rng.choice([None, 3, 0.25]),
        )
        again = parse_method(format_method(method), REGISTRY)
        assert again == method
        assert [type(getattr(again, f.name)) for f in fields(again)] == [
            type(getattr(method, f.name)) for f in fields(method)
        ]
        assert method_from_dict(method_to_dict(method), REGISTRY) == method
