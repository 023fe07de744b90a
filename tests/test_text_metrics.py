"""Metrics of texts: each against a naive count written from its paper, and the libraries where they count alike."""

from __future__ import annotations

import math
import random
import sys
from collections import Counter
from itertools import combinations
from pathlib import Path

import pytest
import sacrebleu

from trimtab.text_metrics import corpus_bleu, corpus_nist, meteor, rouge_l, text_metrics

WORDS = ["the", "cat", "sat", "on", "a", "mat", "near", "river", "and", "pub", "with", "low", "price"]


def texts(count: int, seed: int, least: int = 5) -> list[str]:
    chance = random.Random(seed)
    return [" ".join(chance.choices(WORDS, k=chance.randint(least, 12))) for _ in range(count)]


def case(count: int = 12) -> tuple[list[str], list[list[str]]]:
    """Texts with one to three references each, the first of which has much of the text."""
    made, chance = texts(count, 0), random.Random(1)
    references = []
    for number, text in enumerate(made):
        words = text.split()
        words[chance.randrange(len(words))] = "pub"
        references.append([" ".join([*words, "near"][: 4 + number]), *texts(number % 3, 100 + number)])
    return made, references


def naive_nist(made: list[str], references: list[list[str]]) -> float:
    """Doddington's formula, with the counts of several references as mteval has them."""
    everything = [ref.split() for own in references for ref in own]

    def grams(words: list[str], n: int) -> list[tuple[str, ...]]:
        return list(zip(*(words[at:] for at in range(n)), strict=False)) if len(words) >= n else []

    def info(gram: tuple[str, ...]) -> float:
        longer = sum(grams(ref, len(gram)).count(gram) for ref in everything)
        if len(gram) == 1:
            return math.log2(sum(map(len, everything)) / longer)
        return math.log2(sum(grams(ref, len(gram) - 1).count(gram[:-1]) for ref in everything) / longer)

    score = 0.0
    for n in range(1, 6):
        gained, there = 0.0, 0
        for text, own in zip(made, references, strict=True):
            counted = Counter(grams(text.split(), n))
            there += sum(counted.values())
            for gram, count in counted.items():
                most = max(grams(ref.split(), n).count(gram) for ref in own)
                gained += min(count, most) * info(gram) if most else 0.0
        score += gained / there
    ours = sum(len(text.split()) for text in made)
    ratio = ours / sum(sum(len(ref.split()) for ref in own) / len(own) for own in references)
    beta = math.log(0.5) / math.log(1.5) ** 2
    return score * (math.exp(beta * math.log(ratio) ** 2) if ratio < 1 else 1.0)


def naive_rouge(text: str, reference: str) -> float:
    """F1 of the longest common subsequence, found by trying every subsequence."""
    a, b = text.split(), reference.split()

    def within(part: tuple[str, ...]) -> bool:
        rest = iter(b)
        return all(word in rest for word in part)

    longest = max(size for size in range(len(a) + 1) if any(within(part) for part in combinations(a, size)))
    return 2 * longest / (len(a) + len(b))


def test_nist_is_the_formula_with_several_references():
    made, references = case()
    found = corpus_nist(made, references)
    assert found == pytest.approx(naive_nist(made, references), rel=1e-9)
    assert found > 1
    short = [" ".join(text.split()[:-2]) for text in made]
    assert corpus_nist(short, references) == pytest.approx(naive_nist(short, references), rel=1e-9)
    twice = [[*own, own[0]] for own in references]
    assert corpus_nist(made, twice) == pytest.approx(naive_nist(made, twice), rel=1e-9)


def test_nist_with_one_reference_is_nltks():
    nist = pytest.importorskip("nltk.translate.nist_score")
    made, references = case()
    alone = [own[:1] for own in references]
    theirs = nist.corpus_nist([[ref.split() for ref in own] for own in alone], [text.split() for text in made])
    assert corpus_nist(made, alone) == pytest.approx(theirs, rel=1e-9)


def test_nist_of_texts_that_say_nothing_or_little():
    assert corpus_nist(["", ""], [["a b c"], ["d e f g h i"]]) == 0.0
    assert corpus_nist(["x"], [["a b"]]) == 0.0
    assert 0 < corpus_nist(["a"], [["a b"]]) < 1
    assert corpus_nist(["THE Cat, sat"], [["the cat , sat"]]) == corpus_nist(["the cat, sat"], [["the cat , sat"]]) > 1
    assert corpus_nist(["今天天气好"], [["今天天气真好"]]) > 1  # by characters


def test_rouge_l_is_the_best_references_f1():
    pytest.importorskip("rouge_score")
    made, references = case()
    wanted = [max(naive_rouge(text, ref) for ref in own) for text, own in zip(made, references, strict=True)]
    assert rouge_l(made, references) == pytest.approx(100 * sum(wanted) / len(wanted))
    assert rouge_l(["The cat, sat."], [["the cat sat"]]) == 100
    assert rouge_l(["", "a b"], [["a"], ["x", "a b"]]) == 50
    assert rouge_l(["Кот спит"], [["кот не спит"]]) == pytest.approx(80)
    assert rouge_l(["今天好"], [["今天很好"]]) == pytest.approx(100 * 6 / 7)


def test_bleu_is_sacrebleus_of_padded_references():
    made, references = case()
    streams = [[own[at] if at < len(own) else None for own in references] for at in range(3)]
    assert corpus_bleu(made, references) == sacrebleu.corpus_bleu(made, streams).score


def test_what_is_not_installed_is_left_out(monkeypatch: pytest.MonkeyPatch):
    import trimtab.text_metrics as module

    known = ["bleu", "nist"]
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    assert list(text_metrics(*case())) == known
    monkeypatch.undo()
    pytest.importorskip("rouge_score")
    monkeypatch.setattr(module, "_wordnet", lambda: False)
    assert list(text_metrics(*case())) == [*known, "rouge_l"]


@pytest.fixture
def wordnet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The files of a WordNet whose only synonyms are the nouns cat and kitten."""
    nltk = pytest.importorskip("nltk")
    folder = tmp_path / "corpora" / "wordnet"
    folder.mkdir(parents=True)
    for part in ("adj", "adv", "noun", "verb"):
        for name in (f"index.{part}", f"data.{part}", f"{part}.exc"):
            (folder / name).write_text("")
    synset = "00000000 05 n 02 cat 0 kitten 0 000 | an animal\n"
    (folder / "data.noun").write_text(synset)
    (folder / "index.noun").write_text("cat n 1 0 1 0 00000000  \nkitten n 1 0 1 0 00000000  \n")
    (folder / "lexnames").write_text("".join(f"{n:02}\tname{n}\t1\n" for n in range(45)))
    (folder / "index.sense").write_text("")
    (folder / "cntlist.rev").write_text("")
    monkeypatch.setattr(nltk.data, "path", [str(tmp_path)])
    for name in [name for name in sys.modules if name.startswith("nltk.corpus") or "meteor" in name]:
        monkeypatch.delitem(sys.modules, name)


def test_meteor_takes_synonyms_and_the_best_reference(wordnet: None):
    """Banerjee and Lavie 2005 with nltk's numbers: F = P R / (0.9 P + 0.1 R), penalty 0.5 (chunks / matches)³."""
    made, references = ["the cat sat", "one two"], [["nothing", "the kitten sat"], ["one three"]]
    whole = 1 - 0.5 * (1 / 3) ** 3
    half = 0.5 * (1 - 0.5)
    assert meteor(made, references) == pytest.approx(100 * (whole + half) / 2)
    assert list(text_metrics(made, references))[-1] == "meteor"
