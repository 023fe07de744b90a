"""Writes what the documentation takes from the code: the tables of methods and families, and one page a method.

    python docs/generate.py            writes
    python docs/generate.py --check    exits 1 if a file is not up to date

Between `<!-- generated: NAME -->` and `<!-- end -->` of README.md, README.zh-CN.md and docs/*.md stands the block NAME.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import sys
from pathlib import Path
from typing import Any

from trimtab.adapter import supported
from trimtab.arch import FAMILIES
from trimtab.methods import METHODS
from trimtab.methods.borrowed import facts

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"(<!-- generated: ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
CHINESE = {
    "houlsby": "每层两个瓶颈适配器，连同层归一化一起训练",
    "pfeiffer": "每层一个瓶颈适配器，位于前馈之后",
    "parallel": "每层一个带缩放的瓶颈适配器，与前馈并行",
    "adamix": "训练时随机路由的多个专家，之后平均为一个适配器",
    "ia3": "缩放键、值和前馈的内部激活，可合并进权重",
    "bitfit": "只训练偏置，可合并进权重",
    "layernorm": "只训练归一化的权重，可合并进权重",
    "prompt": "在输入前训练虚拟词元",
    "autoprompt": "在输入前搜索一段可读的文字，不训练任何参数",
    "prefix": "在每个注意力的键和值之前训练前缀",
    "p-tuning": "由小网络产生嵌入的伪词元，位于输入前或模板中",
    "p-tuning-v2": "在每个自注意力的键和值之前训练前缀，并训练任务头",
    "llama-adapter": "顶部各层注意力中的提示，由从零开始的门控引入",
    "llama-adapter-v2": "LLaMA-Adapter，另在每个投影上训练偏置和缩放，并训练归一化",
    "mask": "基座的权重逐个保留或去掉，每个一位，可合并进权重",
    "diff-pruning": "用门控找出的稀疏权重差，可合并进权重",
    "ladder": "冻结主体旁的窄网络，读取各层状态并代替主体输出；主体不做反向传播",
    "side": "冻结主体旁的小网络，在任务头之前与主体融合；主体不做反向传播",
    "lora": "所选投影的低秩更新，可合并进权重",
    "head": "冻结主体，只训练任务头（基线）",
    "full": "训练（副本的）全部参数（基线）",
}
GROUPS = {
    "decoders": (
        "llama",
        "mistral",
        "qwen2",
        "qwen3",
        "gemma2",
        "gemma3_text",
        "phi3",
        "gpt2",
        "gpt_neox",
        "opt",
        "bloom",
    ),
    "encoders": ("bert", "roberta", "electra", "distilbert", "modernbert"),
    "encoder-decoders": ("t5", "bart", "whisper"),
    "vision": ("vit", "dinov2", "clip", "clip_vision_model"),
}
CHINESE_GROUPS = {"decoders": "解码器", "encoders": "编码器", "encoder-decoders": "编码器-解码器", "vision": "视觉"}


def methods_table(chinese: bool = False) -> str:
    """One row a method."""
    head = (
        ("方法", "训练什么", "参数量", "合并", "来源")
        if chinese
        else ("method", "trains", "parameters", "merges", "paper")
    )
    rows = []
    for name, method in METHODS.items():
        said = CHINESE.get(name, _first_line(method).rstrip(".")) if chinese else _first_line(method).rstrip(".")
        merges = ("是" if method.mergeable else "否") if chinese else ("yes" if method.mergeable else "no")
        rows.append((f"[`{name}`](docs/methods/{name}.md)", said, method.formula, merges, method.paper))
    return _table(head, rows)


def families_table(chinese: bool = False) -> str:
    """One row a group of families, with the methods that work on all of them."""
    known = {name for names in GROUPS.values() for name in names}
    groups = GROUPS | (
        {"others": tuple(name for name in FAMILIES if name not in known)} if set(FAMILIES) - known else {}
    )
    rows = []
    for group, names in groups.items():
        working = [text for name, method in METHODS.items() if (text := _where(name, method, names, chinese))]
        rows.append((CHINESE_GROUPS.get(group, group) if chinese else group, ", ".join(names), ", ".join(working)))
    return _table(("类别", "模型家族", "方法") if chinese else ("kind", "families", "methods"), rows)


def _where(name: str, method: Any, families: tuple[str, ...], chinese: bool) -> str:
    """The method's name if it works on these families, with those on which it does not."""
    missing = [family for family in families if family not in supported(method.kinds)]
    if len(missing) == len(families):
        return ""
    note = "除" if chinese else "not "
    return f"{name} ({note}{', '.join(missing)})" if missing else name


def bridge_table() -> str:
    """One row a method of peft's, as it was found out (benchmarks/bridge.py)."""
    rows = []
    for name, one in facts()["methods"].items():
        answers = ["yes" if one[key] else "no" for key in ("works", "merges")]
        rows.append((f"`peft:{name}`", *answers, one["why"]))
    return f"Found out with peft {facts()['peft']}.\n\n" + _table(("method", "works", "merges", "why not"), rows)


BLOCKS = {
    "bridge": bridge_table,
    "methods": methods_table,
    "families": families_table,
    "methods-zh": lambda: methods_table(chinese=True),
    "families-zh": lambda: families_table(chinese=True),
}


def method_page(name: str) -> str:
    """A method's page: its module's text, its fields, its families. Measured numbers are written below by hand."""
    method: Any = METHODS[name]
    module = inspect.getdoc(inspect.getmodule(method)) or ""
    title, _, rest = module.partition("\n")
    fields = _field_docs(method)
    lines = [f"# {name}", "", title, rest, "", "## Options", ""]
    if fields:
        lines.append(
            _table(("field", "default", "meaning"), [(f"`{key}`", f"`{value}`", doc) for key, value, doc in fields])
        )
    else:
        lines.append("None.")
    lines += [
        "",
        "## Where it works",
        "",
        f"Site kinds: {', '.join(sorted(method.kinds)) or 'none'}. Families: {', '.join(supported(method.kinds))}.",
        "",
        f"Merges into the base weights: {'yes' if method.mergeable else 'no'}. Default learning rate: {method.lr:g}.",
    ]
    return "\n".join(lines).strip() + "\n"


def _field_docs(method: Any) -> list[tuple[str, Any, str]]:
    """(name, default, the line under the field) of each field."""
    tree = ast.parse(inspect.getsource(method)).body[0]
    assert isinstance(tree, ast.ClassDef)
    docs: dict[str, str] = {}
    for field, below in zip(tree.body, tree.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
            docs[getattr(field.target, "id", "")] = " ".join(str(below.value.value).split())
    return [(field.name, field.default, docs[field.name]) for field in dataclasses.fields(method)]


def _first_line(thing: Any) -> str:
    return (inspect.getdoc(thing) or "").partition("\n")[0]


def _table(head: tuple[str, ...], rows: list[tuple[Any, ...]]) -> str:
    def line(cells: tuple[Any, ...]) -> str:
        return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"

    return "\n".join([line(head), line(("---",) * len(head)), *map(line, rows)]) + "\n"


def wanted() -> dict[Path, str]:
    """Every generated file and what should be in it."""
    files: dict[Path, str] = {}
    for path in [ROOT / "README.md", ROOT / "README.zh-CN.md", *sorted((ROOT / "docs").glob("*.md"))]:
        text = path.read_text(encoding="utf-8")
        files[path] = BLOCK.sub(lambda found: found[1] + BLOCKS[found[2]]() + found[3], text)
    for name in METHODS:
        path = ROOT / "docs" / "methods" / f"{name}.md"
        _, mark, by_hand = (
            path.read_text(encoding="utf-8").partition("<!-- by hand -->") if path.exists() else ("", "", "")
        )
        files[path] = method_page(name) + "\n<!-- by hand -->" + (by_hand if mark else "\n")
    return files


def main() -> int:
    """Writes the files, or compares them."""
    stale = [path for path, text in wanted().items() if not path.exists() or path.read_text(encoding="utf-8") != text]
    if "--check" in sys.argv:
        print("\n".join(f"not up to date: {path.relative_to(ROOT)}" for path in stale) or "up to date")
        return 1 if stale else 0
    files = wanted()
    for path in stale:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(files[path], encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
