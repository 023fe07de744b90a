"""Numbers that say how good answers are that are no texts (text_metrics.py). Knows predictions and truths; refuses to
know models and tasks."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence


def classification_metrics(predicted: Sequence[int], gold: Sequence[int], classes: int) -> dict[str, float]:
    """accuracy, macro_f1 over all classes (one that never occurs counts 0) and mcc."""
    from sklearn.metrics import accuracy_score, matthews_corrcoef

    return {
        "accuracy": float(accuracy_score(gold, predicted)),
        "macro_f1": macro_f1(predicted, gold, classes),
        "mcc": float(matthews_corrcoef(gold, predicted)),
    }


def macro_f1(predicted: Sequence[int], gold: Sequence[int], classes: int) -> float:
    """The mean of the classes' F1; one that never occurs counts 0, a prediction that is no class (-1) is a miss."""
    from sklearn.metrics import f1_score

    return float(f1_score(gold, predicted, labels=range(classes), average="macro", zero_division=0))


def regression_metrics(predicted: Sequence[float], gold: Sequence[float]) -> dict[str, float]:
    """pearson and spearman (0 where one side is constant, which correlates with nothing) and mse."""
    from scipy.stats import pearsonr, spearmanr

    mse = sum((a - b) ** 2 for a, b in zip(predicted, gold, strict=True)) / len(gold)
    if len(set(predicted)) < 2 or len(set(gold)) < 2:
        return {"pearson": 0.0, "spearman": 0.0, "mse": mse}
    return {
        "pearson": float(pearsonr(predicted, gold).statistic),
        "spearman": float(spearmanr(predicted, gold).statistic),
        "mse": mse,
    }


# Entities


Entity = tuple[str, int, int]
"""Type, first word, word behind the last."""


def is_bio(tags: Sequence[str]) -> bool:
    """Whether tags mark entities: O, B-type and I-type, or O, B and I."""
    return all(re.fullmatch(r"O|[BI](-.+)?", tag) for tag in tags) and any(tag != "O" for tag in tags)


def entities(tags: Sequence[str | None]) -> list[Entity]:
    """The entities of one text, as CoNLL's script reads them; None is no tag.

    One begins at B, and at an I that continues none of its type (IOB1, and mistakes of a model).
    """
    found: list[Entity] = []
    begun: tuple[str, int] | None = None
    for at, tag in enumerate([*tags, None]):
        mark, _, kind = (tag or "O").partition("-")
        if mark == "I" and begun is not None and begun[0] == kind:
            continue
        if begun is not None:
            found.append((*begun, at))
        begun = None if mark == "O" else (kind, at)
    return found


def entity_f1(predicted: Sequence[Sequence[str | None]], gold: Sequence[Sequence[str | None]]) -> float:
    """Micro F1 of whole entities, type and both ends right: 2 · hits / (predicted + true); 0 where there are none."""
    found, true = (
        [(row, *one) for row, tags in enumerate(side) for one in entities(tags)] for side in (predicted, gold)
    )
    both = len(found) + len(true)
    return 2 * len(set(found) & set(true)) / both if both else 0.0


# Spans


def span_metrics(texts: Sequence[str], right: Sequence[Sequence[str]]) -> dict[str, float]:
    """exact_match and f1 (0 to 1), the means over questions of the best of each one's right answers.

    SQuAD's definition (Rajpurkar et al. 2016, arXiv:1606.05250): lower case, without punctuation and without a, an,
    the; f1 is that of the bags of words. It knows words between spaces alone, so Chinese answers are one word.
    """
    pairs = list(zip(texts, right, strict=True))
    exact = sum(max(_plain(text) == _plain(one) for one in own) for text, own in pairs)
    return {
        "exact_match": exact / len(pairs),
        "f1": sum(max(_f1(text, one) for one in own) for text, own in pairs) / len(pairs),
    }


def _plain(text: str) -> list[str]:
    """SQuAD's words of an answer."""
    kept = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", kept).split()


def _f1(text: str, right: str) -> float:
    said, wanted = _plain(text), _plain(right)
    if not said or not wanted:
        return float(said == wanted)
    return 2 * sum((Counter(said) & Counter(wanted)).values()) / (len(said) + len(wanted))
