"""Where settings come from, who wins, and that all mistakes are told at once."""

from __future__ import annotations

import dataclasses

import pytest
import yaml

from trimtab.config import default, field_docs, is_flag, metavar, names, resolve
from trimtab.errors import UserError
from trimtab.methods import LoRA, Union
from trimtab.settings import TrainSettings

GIVEN = {"model": "m", "data": "d.jsonl", "output": "out"}


def write(tmp_path, text: str):
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def mistakes(*args, **options) -> list[str]:
    with pytest.raises(UserError) as caught:
        resolve(*args, **options)
    return str(caught.value).splitlines()


def test_every_setting_has_a_line_of_help():
    docs = field_docs(TrainSettings)
    assert list(docs) == names() == [field.name for field in dataclasses.fields(TrainSettings)]
    assert all(text and "\n" not in text for text in docs.values())


def test_what_is_not_given_is_the_settings_own_default():
    assert dataclasses.replace(resolve(flags=GIVEN), method="lora") == TrainSettings(**GIVEN)


def test_flags_win_over_assignments_and_those_over_the_file(tmp_path):
    file = write(tmp_path, "model: a\ndata: a\noutput: a\nseed: 1\nepochs: 1\nlr: 1e-3\n")
    settings = resolve(file, ["seed=2", "epochs=2", "data=b"], {"seed": "3", "data": None})
    assert (settings.model, settings.data, settings.lr, settings.epochs, settings.seed) == ("a", "b", 1e-3, 2.0, 3)


def test_values_have_the_settings_types(tmp_path):
    text = "model: 7\nchat: yes\nepochs: 2\nlr: 1e-3\nlimit: '10'\nlabel_words: {0: no, 1: yes}\ntext-column: on\n"
    settings = resolve(write(tmp_path, text), flags={"data": "d", "output": "o", "method": "lora[r=4]"})
    assert settings.model == "7"
    assert settings.chat is True
    assert (settings.epochs, type(settings.epochs)) == (2.0, float)
    assert (settings.lr, settings.limit) == (1e-3, 10)
    assert settings.label_words == {"0": "no", "1": "yes"}
    assert settings.text_column == "on"
    assert settings.method == LoRA(r=4)


@pytest.mark.parametrize("method", ["{name: lora, r: 4, targets: [q]}", "'lora[r=4,targets=q]'"])
def test_a_method_in_yaml_is_a_mapping_or_a_string(tmp_path, method):
    assert resolve(write(tmp_path, f"method: {method}"), flags=GIVEN).method == LoRA(r=4, targets=("q",))


def test_a_union_on_the_command_line():
    assert isinstance(resolve(flags={**GIVEN, "method": "prompt[length=3]|lora"}).method, Union)


def test_label_words_and_line_breaks_as_a_shell_passes_them_on():
    settings = resolve(flags={**GIVEN, "label_words": "0=no, 1=yes", "template": r"Headline: {text}\nSarcastic:"})
    assert settings.label_words == {"0": "no", "1": "yes"}
    assert settings.template == "Headline: {text}\nSarcastic:"


def test_null_means_not_given(tmp_path):
    settings = resolve(write(tmp_path, "lr: null\nseed: ~\neval_limit: null\n"), ["epochs=none"], GIVEN)
    assert (settings.lr, settings.seed, settings.epochs, settings.eval_limit) == (None, 0, 3.0, None)


def test_a_finished_runs_file_is_accepted(tmp_path):
    from trimtab.run_folder import begin

    begun = TrainSettings(**GIVEN, method=LoRA(r=4), label_words={"0": "no", "1": "yes"}, lr=1e-3, batch_tokens=99)
    begin(tmp_path, begun)
    assert yaml.safe_load((tmp_path / "run.yaml").read_text(encoding="utf-8"))["versions"]["torch"]
    assert resolve(tmp_path / "run.yaml") == begun
    assert resolve(tmp_path / "run.yaml", flags={"batch_size": "4"}).batch_tokens is None


def test_a_runs_file_starts_the_same_run_from_any_folder(tmp_path, monkeypatch):
    from trimtab.run_folder import begin, begun

    (tmp_path / "model").mkdir()
    (tmp_path / "d.jsonl").touch()
    monkeypatch.chdir(tmp_path)
    given = TrainSettings("model", "d.jsonl", "out", eval_data="owner/name", eval_limit=None, lr=1e-3, max_length=64)
    begin(tmp_path / "out", given)
    monkeypatch.chdir("/")
    here = {"model": str(tmp_path / "model"), "data": str(tmp_path / "d.jsonl"), "output": str(tmp_path / "out")}
    assert begun(tmp_path / "out") == dataclasses.replace(given, method=LoRA(), **here)
    assert begun(tmp_path) is None


def test_a_tilde_is_the_home_folder_of_paths_only(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    settings = TrainSettings("~/m", "~/d", "~/o", eval_data="~/e", template="~/{text}")
    found = (settings.model, settings.data, settings.output, settings.eval_data, settings.template)
    assert found == ("/home/me/m", "/home/me/d", "/home/me/o", "/home/me/e", "~/{text}")


def test_all_mistakes_come_at_once(tmp_path):
    file = write(tmp_path, "modle: x\nepochs: -1\nmethod: {name: lora, rank: 3}\ntask: clasify\n")
    flags = {"data": "d", "lr": "fast", "batch_size": "3", "batch_tokens": "4"}
    found = mistakes(file, ["nonsense", "wibble=3"], flags)
    expected = [
        ["nonsense", "key=value"],
        ["modle='x'", "(run.yaml)", "did you mean model?"],
        ["wibble='3'", "(--set)", "allowed: model, data"],
        ["batch_size and batch_tokens cannot both be given"],
        ["--model is missing"],
        ["--output is missing"],
        ["method:", "field of lora 'rank'", "allowed: r, alpha"],
        [
            *("task='clasify' (run.yaml)", "'classify', 'regress', 'tag', 'span', 'choose' or 'generate'"),
            "did you mean classify?",
        ],
        ["epochs='-1' (run.yaml)", "greater than 0"],
        ["lr='fast'", "must be a valid number"],
    ]
    assert len(found) == len(expected)
    for words in expected:
        assert [line for line in found if all(word in line for word in words)], (words, found)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"eval_share": "1"}, "less than 1"),
        ({"eval_share": "0.5", "eval_data": "e"}, "eval_data and eval_share cannot both"),
        ({"resume": True, "overwrite": True}, "resume and overwrite cannot both"),
        ({"lr": "nan"}, "finite number"),
        ({"lr": "inf"}, "finite number"),
        ({"epochs": "0"}, "greater than 0"),
        ({"limit": "1.5"}, "valid integer"),
        ({"seed": "-1"}, "greater than or equal to 0"),
        ({"dtype": "float8"}, "did you mean float"),
        ({"label_words": "no,yes"}, "0=no,1=yes"),
        ({"method": "lora[r=0]"}, "r=0 must be at least 1"),
        ({"method": "lora[r=8"}, "never closed"),
    ],
)
def test_a_value_that_is_not_allowed(flags, words):
    (line,) = mistakes(flags={**GIVEN, **flags})
    assert words in line


@pytest.mark.parametrize(
    ("text", "words"), [("- a\n", "must hold settings"), ("a: [", "not valid YAML"), ("\x00", "not valid YAML")]
)
def test_a_broken_file_is_one_sentence(tmp_path, text, words):
    (line,) = mistakes(write(tmp_path, text))
    assert words in line


def test_a_missing_file_is_one_sentence(tmp_path):
    (line,) = mistakes(tmp_path / "none.yaml")
    assert "none.yaml" in line


def test_an_empty_file_sets_nothing(tmp_path):
    assert resolve(write(tmp_path, "# nothing\n"), flags=GIVEN) == resolve(flags=GIVEN)


def test_signs_for_the_help():
    assert [metavar(name) for name in ("model", "epochs", "limit", "label_words", "template")] == [
        "MODEL",
        "X",
        "N",
        "LABEL=WORD,…",
        "TEXT",
    ]
    assert [name for name in names() if is_flag(name)] == ["chat", "resume", "overwrite", "gradient_checkpointing"]
    assert default("model") is None
    assert default("eval_share") == 0.1
