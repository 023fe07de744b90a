"""Numbers that say how good texts are, each against several references. Knows texts; refuses to know models and tasks.

BLEU and NIST are always there. ROUGE-L and METEOR come from the packages of the extra `metrics`, METEOR with WordNet's
data besides; where these are not installed, those metrics are left out.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from statistics import fmean
from typing import Any

References = Sequence[Sequence[str]]
"""Each text's references, at least one."""
ORDERS = 5
"""The longest n-grams of NIST."""
_HAN = "\u4e00-\u9fff"
_HALF_AT = 2 / 3
"""The share of the references' length at which NIST is halved."""


def text_metrics(texts: Sequence[str], references: References) -> dict[str, float]:
    """bleu and nist; rouge_l and meteor where their packages and data are installed."""
    found = {"bleu": corpus_bleu(texts, references), "nist": corpus_nist(texts, references)}
    if find_spec("rouge_score"):
        found["rouge_l"] = rouge_l(texts, references)
    if _wordnet():
        found["meteor"] = meteor(texts, references)
    return found


def corpus_bleu(texts: Sequence[str], references: References) -> float:
    """sacrebleu's corpus BLEU (0 to 100); Chinese is cut into characters, other scripts as is its default."""
    import sacrebleu

    most = max(len(refs) for refs in references)
    streams: list[Any] = [[refs[i] if i < len(refs) else None for refs in references] for i in range(most)]
    return float(sacrebleu.corpus_bleu(list(texts), streams, tokenize=_cut(references)).score)


def corpus_nist(texts: Sequence[str], references: References) -> float:
    """NIST (Doddington 2002), as mteval-v13a counts it with several references: words as for BLEU, in lower case.

    Σ_n Σ_g min(count(g), max over references) · info(g) / Σ texts' n-grams · penalty,     n = 1 … 5
    info(w_1 … w_n) = log2(count(w_1 … w_{n-1}) / count(w_1 … w_n)) in all references
    penalty = 2^-(log min(1, r) / log(2/3))²,     r = the texts' words / the references', averaged for each text
    """
    cut = _cut(references)
    ours = _words(texts, cut)
    theirs = [_words(own, cut) for own in references]
    everywhere = Counter(gram for own in theirs for ref in own for n in range(1, ORDERS + 1) for gram in _grams(ref, n))
    everywhere[()] = sum(len(ref) for own in theirs for ref in own)
    score = 0.0
    for n in range(1, ORDERS + 1):
        hits: Counter[tuple[str, ...]] = Counter()
        for text, own in zip(ours, theirs, strict=True):
            most: Counter[tuple[str, ...]] = Counter()
            for ref in own:
                most |= Counter(_grams(ref, n))
            hits += Counter(_grams(text, n)) & most
        information = sum(count * math.log2(everywhere[gram[:-1]] / everywhere[gram]) for gram, count in hits.items())
        score += information / max(1, sum(len(text) - n + 1 for text in ours if len(text) >= n))
    return score * _length_penalty(sum(map(len, ours)), sum(fmean(map(len, own)) for own in theirs))


def rouge_l(texts: Sequence[str], references: References) -> float:
    """The mean over texts of the best reference's ROUGE-L (0 to 100): F1 of the longest common subsequence.

    Words are letters and digits in lower case; Chinese is cut into characters.
    """
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], tokenizer=_RougeWords())
    best = [scorer.score_multi(list(own), text)["rougeL"].fmeasure for text, own in zip(texts, references, strict=True)]
    return 100 * fmean(float(one) for one in best)


def meteor(texts: Sequence[str], references: References) -> float:
    """The mean over texts of the best reference's METEOR (0 to 100), as nltk counts it with WordNet's synonyms."""
    from nltk.translate.meteor_score import meteor_score

    cut = _cut(references)
    pairs = zip(_words(texts, cut), references, strict=True)
    return 100 * fmean(float(meteor_score(_words(own, cut), text)) for text, own in pairs)


def _wordnet() -> bool:
    """Whether nltk and its WordNet are installed."""
    if not find_spec("nltk"):
        return False
    from nltk import data

    for name in ("corpora/wordnet", "corpora/wordnet.zip"):
        try:
            data.find(name)
            return True
        except LookupError:
            continue
    return False


def _length_penalty(ours: float, theirs: float) -> float:
    if not ours:
        return 0.0
    return 0.5 ** ((math.log(min(1.0, ours / theirs)) / math.log(_HALF_AT)) ** 2) if theirs else 1.0


def _grams(words: Sequence[str], n: int) -> Iterator[tuple[str, ...]]:
    return (tuple(words[at : at + n]) for at in range(len(words) - n + 1))


def _cut(references: References) -> str:
    """How sacrebleu cuts texts into words: "zh" where more than a third of the references is Chinese."""
    text = "".join(ref for refs in references for ref in refs)
    return "zh" if 3 * len(re.findall(f"[{_HAN}]", text)) > len(text) else "13a"


def _words(texts: Sequence[str], cut: str) -> list[list[str]]:
    """Texts in lower case as words."""
    from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a
    from sacrebleu.tokenizers.tokenizer_zh import TokenizerZh

    split = TokenizerZh() if cut == "zh" else Tokenizer13a()
    return [split(text.lower()).split() for text in texts]


class _RougeWords:
    """What rouge_score calls a tokenizer; its own knows ASCII only."""

    def tokenize(self, text: str) -> list[str]:
        return re.findall(rf"[{_HAN}]|[^\W_{_HAN}]+", text.lower())
