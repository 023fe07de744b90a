"""Searching architectures: the space, halving, studies that several processes share, and what a search reports."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import random
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
import transformers as tf

import tiny
import trimtab as tt
from browser import CHROMIUM, opened
from test_cli import byte_tokenizer, refused, run, write_rows
from test_comparison import BEST, CLOSE, WORSE, Page, comparison
from test_comparison import rows as examples
from trimtab.arch import supports
from trimtab.bootstrap import Difference
from trimtab.comparison.bench import Base, Bench
from trimtab.comparison.plan import Cell
from trimtab.errors import UserError
from trimtab.methods.spec import format_method, parse_method
from trimtab.searching import report, steps, storage, trials
from trimtab.searching.halving import Reached, stops
from trimtab.searching.results import SearchResult, choose, pick, sentence
from trimtab.searching.space import MEMBERS, Space, layer_map, layers_text, space_of
from trimtab.searching.trials import Trial, front, read_objectives
from trimtab.sites import Sites

SIZES = {"vocab_size": 259, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = tf.BertConfig(**SIZES, num_attention_heads=2, max_position_embeddings=64, pad_token_id=0)
    tf.BertForMaskedLM(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    return write_rows(tmp_path_factory.mktemp("data") / "data.jsonl", examples())


def settings(model: str, data: str, folder: Path, **other: Any) -> tt.TrainSettings:
    own: dict[str, Any] = {"epochs": 1, "eval_share": 0.2, "max_length": 32}
    return tt.TrainSettings(model=model, data=data, output=str(folder), **{**own, **other})


def search(asked: tt.TrainSettings, **other: Any) -> SearchResult:
    """A search whose pictures are not drawn, which takes longer than all the rest."""
    own: dict[str, Any] = {"trials": 5, "seeds": 2, "points": 1, "dev_share": 0.3, "show": False}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(steps, "write_report", lambda found: None)
        found = tt.search(asked, **{**own, "methods": ["lora", "ia3", "bitfit"], **other})
    assert found is not None
    return found


@pytest.fixture(scope="module")
def finished(tmp_path_factory, model, data) -> tuple[Path, SearchResult]:
    folder = tmp_path_factory.mktemp("search") / "out"
    return folder, search(settings(model, data, folder))


# -- the space ----------------------------------------------------------------------------------------------------


class Chance:
    """Draws a point as Optuna's random sampler would."""

    def __init__(self, seed: int):
        self.source = random.Random(seed)

    def suggest_categorical(self, name: str, choices: Any) -> Any:
        return self.source.choice(choices)

    def suggest_int(self, name: str, low: int, high: int) -> int:
        return self.source.randint(low, high)

    def suggest_float(self, name: str, low: float, high: float, log: bool) -> float:
        assert log
        return low * (high / low) ** self.source.random()


def space(family: str = "bert", names: Any = None, head: bool = True) -> Space:
    return space_of(tiny.tiny(family).config, names, head, None)


@pytest.mark.parametrize("family", ["bert", "roberta", "llama", "gpt2", "bloom", "t5"])
def test_every_point_is_a_method_that_fits_and_comes_off_again(family) -> None:
    made, base = space(family, head=False), tiny.tiny(family)
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    points = [made.suggest(Chance(seed)) for seed in range(6)] + list(made.starts().values())
    for point in points:
        text = made.method(point)
        if text is None:
            continue
        assert format_method(parse_method(text)) == text
        adapter = tt.attach(base, text)
        heads = sum(weight.numel() for site in Sites(base).task_head for weight in site.module.parameters())
        assert parse_method(text).parameter_count(Sites(base)) == sum(w.numel() for w in adapter.parameters()) - heads
        adapter.detach()
    after = base.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize("family", ["bert", "bloom", "t5"])
def test_members_are_those_that_fit_the_family(family) -> None:
    made = space(family)
    assert {one.name for one in made.members} == {
        one.name for one in MEMBERS if supports(one.method.kinds, made.sites.family)
    }
    assert ("prefix" in made.sizes) == (family != "bloom")


def test_what_a_point_means() -> None:
    made = space()
    point = {**made.starts()["lora"], "ia3": True, "layer.0": False, "lr": 0.0012345}
    assert made.method(point) == "lora[layers=1:]|ia3[layers=1:]"
    assert made.rate(point) == 0.0012
    assert made.method({**point, "layer.1": False}) == "lora[layers=2]|ia3[layers=2]"
    assert made.method({**point, "layer.0": True, "layer.1": False}) == "lora[layers=0,2]|ia3[layers=0,2]"
    assert made.method({**point, "layer.0": True, "lora.size": 1, "ia3": False}) == "lora[r=2,alpha=4.0]"
    assert made.method({**point, "lora": False, "ia3": False}) == "head"
    assert space(head=False).method({**point, "lora": False, "ia3": False}) is None
    assert layers_text([1, 2], 3) == "1:" and layers_text([0, 1, 2], 3) is None and layers_text([2], 3) == "2"
    assert layer_map("lora[r=4,layers=0,2]|prefix[length=3,layers=2]", 3) == [
        {"lora": "4"}, {}, {"lora": "4", "prefix": "3"}
    ]  # fmt: skip


def test_the_number_of_architectures_is_counted_out() -> None:
    made = space(names=["lora", "ia3"])
    points = [
        {"lora": lora, "lora.size": size, "ia3": ia3, **{f"layer.{at}": bool(bits >> at & 1) for at in range(3)}}
        for lora in (False, True) for size in range(len(made.sizes["lora"])) for ia3 in (False, True)
        for bits in range(8)
    ]  # fmt: skip
    assert made.architectures == len({made.method(point) for point in points})
    assert made.largest == parse_method("lora[r=16]|ia3").parameter_count(made.sites)


def test_a_prefix_leaves_room_for_the_text() -> None:
    config = tiny.tiny("bert").config  # 64 positions
    assert space_of(config, None, True, 62).sizes["prefix"] == (1, 2)
    assert "prefix" not in space_of(config, None, True, 64).sizes
    assert space_of(config, None, True, 62).longest(config, 62) == 62
    assert space_of(config, None, True, None).longest(config, None) == 64 - 8


# -- halving and the front ----------------------------------------------------------------------------------------


def test_the_worse_half_of_those_that_are_no_larger_is_stopped() -> None:
    others = [Reached(100, (score, score)) for score in (0.1, 0.3, 0.5, 0.7)]
    assert stops(100, [0.2], others) and not stops(100, [0.4], others)
    assert stops(100, [0.9, 0.2], others)  # the second rung has its own rivals
    assert not stops(99, [0.0], others)  # all rivals are larger
    assert not stops(100, [0.0], others[:3])  # too few rivals
    assert not stops(100, [0.5, 0.0], [Reached(1, (0.9,))] * 9)  # nobody reached this rung


def trial(number: int, score: float, parameters: int, **other: Any) -> Trial:
    own: dict[str, Any] = {"lr": 1e-3, "start": None, "share": parameters / 1000, "seconds": 1.0, "rungs": (0.1, 0.2)}
    return Trial(number=number, method=f"lora[r={number + 1}]", score=score, parameters=parameters,
                 **{**own, "stopped_at": None, **other})  # fmt: skip


TRIALS = [trial(0, 0.8, 50, start="lora"), trial(1, 0.8, 40), trial(2, 0.7, 10), trial(3, 0.6, 20),
          trial(4, 0.95, 5, stopped_at=0.25), trial(5, 0.8, 40), trial(6, 0.85, 300)]  # fmt: skip


def test_the_front_has_what_no_other_beats() -> None:
    assert [one.number for one in front(TRIALS, ("accuracy", "parameters"), 1)] == [6, 1, 2]
    assert [one.number for one in front(TRIALS, ("accuracy",), 1)] == [6]
    assert [one.number for one in front(TRIALS, ("loss", "parameters"), -1)] == [3, 2]


def test_what_is_trained_again() -> None:
    line = front(TRIALS, ("accuracy", "parameters"), 1)
    assert [one.number for one in pick(line, TRIALS, 2, None, 1)] == [6, 1, 0]  # the single method comes along
    assert [one.number for one in pick(line, TRIALS, 2, 0.1, 1)] == [1, 2, 0]
    assert [one.number for one in pick(line, TRIALS, 2, 0.001, 1)] == [2, 0]


def test_the_choice_is_made_by_the_development_rows() -> None:
    better = dataclasses.replace(CLOSE, runs=tuple(dataclasses.replace(one, dev=0.9) for one in CLOSE.runs))
    assert choose([BEST, better, WORSE], None, 1) is better  # BEST is better on the test rows
    assert choose([BEST, better, WORSE], None, -1) is WORSE  # of equals the smaller
    assert choose([dataclasses.replace(BEST, share=0.5)], 0.1, 1) is None


def test_the_recommendation_is_one_sentence(tmp_path) -> None:
    found = comparison(tmp_path)
    said = sentence(CLOSE, found, 40, BEST, Difference(-0.01, -0.03, 0.01), 0.02)
    assert said == (
        "Take lora[r=8] with the learning rate 0.001: accuracy 0.800 ± 0.014 over 2 seeds on 400 test rows with 8,000 "
        "trained parameters (1.000%), on development rows the best that trains at most 2.000% of the model of 3 "
        "trained again out of 40 trials; against houlsby, the best single method of usual size, it is -0.010 (95 % "
        "interval -0.030 to +0.010, which cannot be told from no difference) with 8,000 instead of 50,000 parameters."
    )
    assert "none that trains at most 2.000% of the model was found" in sentence(None, found, 40, None, None, 0.02)


def test_objectives() -> None:
    assert read_objectives(None, ("accuracy", "loss")) == ("accuracy", "parameters")
    assert read_objectives("loss, seconds,parameters", ("accuracy", "loss")) == ("loss", "seconds", "parameters")


# -- a whole search -----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_command_of_a_trial_gives_its_score(finished, tmp_path) -> None:
    _, found = finished
    one = next(one for one in found.trials if one.start == "ia3")
    words = shlex.split(found.commands[one.number])
    words[words.index("--output") + 1] = str(tmp_path / "again")
    assert run(*words[1:]).exit_code == 0
    metrics = json.loads((tmp_path / "again" / "metrics.json").read_text())
    assert metrics["after"]["accuracy"] == pytest.approx(one.score, abs=1e-9)
    assert metrics["parameters"]["trainable"] == one.parameters


def test_the_best_folder_gives_the_test_score(finished) -> None:
    folder, found = finished
    assert found.adapter == str(folder / "best") and found.method == found.comparison.recommended
    best = max(found.row.runs, key=lambda one: (one.dev, -one.seed))
    again = tt.evaluate_run(found.adapter, str(folder / "rows" / "test.jsonl"), show=False)
    assert again["accuracy"] == pytest.approx(best.score, abs=1e-9)
    assert len(found.layers) == 2 and len(found.trials) == 5
    assert [one.start for one in found.trials[:3]] == ["lora", "ia3", "bitfit"]


def test_a_second_call_runs_nothing_and_says_the_same(finished, model, data, monkeypatch) -> None:
    folder, found = finished
    for name in ("attempt", "train", "score"):
        monkeypatch.setattr(Bench, name, None)
    assert search(settings(model, data, folder)) == found


def test_one_base_serves_all_and_test_rows_wait_for_the_end(tmp_path, model, data, monkeypatch) -> None:
    bases: list[tuple[Base, dict[str, torch.Tensor]]] = []
    order: list[str] = []
    plain = Base.__init__, Bench.attempt, Bench.score

    def noted(self: Base, load: Any, seed: int) -> None:
        plain[0](self, load, seed)
        bases.append((self, {name: tensor.clone() for name, tensor in self.model.state_dict().items()}))

    monkeypatch.setattr(Base, "__init__", noted)
    monkeypatch.setattr(Bench, "attempt", lambda self, *given: order.append("try") or plain[1](self, *given))
    monkeypatch.setattr(Bench, "score", lambda self, *given: order.append("test") or plain[2](self, *given))
    found = search(settings(model, data, tmp_path / "out"), trials=3, seeds=1)
    ((base, before),) = bases
    after = base.model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
    assert order == ["try"] * 3 + ["test"] * len(found.comparison.rows)


def test_a_trial_that_is_stopped_keeps_what_it_had(tmp_path, model, data, monkeypatch) -> None:
    monkeypatch.setattr(trials, "stops", lambda parameters, scores, rivals: len(rivals) >= 2 and len(scores) == 2)
    found = search(settings(model, data, tmp_path / "out"), trials=3, seeds=1)
    stopped = found.trials[2]
    assert stopped.stopped_at == pytest.approx(0.5, abs=0.1)
    assert stopped.score == stopped.rungs[1] and stopped not in found.front
    assert stopped.whole_seconds == pytest.approx(stopped.seconds / stopped.stopped_at)
    assert all(one.stopped_at is None and len(one.rungs) == 2 for one in found.trials[:2])


def test_ctrl_c_loses_the_present_trial_only_and_its_point_comes_again(tmp_path, model, data, monkeypatch) -> None:
    plain, calls = Bench.attempt, []

    def stopped(self: Bench, cell: Cell, watch: Any) -> Any:
        calls.append(cell.method)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return plain(self, cell, watch)

    monkeypatch.setattr(Bench, "attempt", stopped)
    asked = settings(model, data, tmp_path / "out")
    with pytest.raises(KeyboardInterrupt):
        search(asked, trials=3, seeds=1)
    found = search(asked, trials=3, seeds=1)
    assert calls == ["lora", "ia3", "bitfit", "ia3"]
    assert [one.start for one in found.trials] == ["lora", "bitfit", "ia3"]


def test_trials_that_fail_are_left_out_and_many_in_a_row_end_the_search(tmp_path, model, data, monkeypatch) -> None:
    def broken(self: Bench, cell: Cell, watch: Any) -> Any:
        raise UserError("the loss is not finite")

    monkeypatch.setattr(Bench, "attempt", broken)
    with pytest.raises(UserError, match="8 trials failed one after the other, the last one because: the loss is not"):
        search(settings(model, data, tmp_path / "out"), trials=30)


def test_prefix_and_biases_above_a_trunk(tmp_path, model, data) -> None:
    method = "prefix[length=2,form=flat,layers=1]|bitfit[layers=1]"
    losses = []
    for memory in (0.0, 1.0):
        folder = tmp_path / str(memory)
        tt.fine_tune(settings(model, data, folder, method=method, lr=1e-2, cache_memory=memory, epochs=2), show=False)
        losses.append(json.loads((folder / "metrics.json").read_text())["after"]["loss"])
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


# -- studies that several processes share -------------------------------------------------------------------------


def study(path: Path, about: Any = None, method: str = "random") -> Any:
    return storage.open_study(storage.reach(str(path)), ["maximize", "minimize"], about or {"epochs": 1}, method, 0)


def test_a_trial_of_a_process_that_is_gone_is_given_up_and_comes_again(tmp_path) -> None:
    made = study(tmp_path / "journal")
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    owners = [[socket.gethostname(), gone.pid], [socket.gethostname(), os.getppid()], ["elsewhere", 1]]
    for owner in owners:
        one = made.ask()
        one.suggest_float("x", 0, 1)
        one.set_user_attr(storage.OWNER, owner)
        one.set_user_attr(storage.START, "lora")
    lost = made.trials[0].params
    assert storage.running(made) == 2
    states = [one.state.name for one in made.trials]
    assert states == ["FAIL", "RUNNING", "RUNNING", "WAITING"]
    again = made.ask()
    assert {"x": again.suggest_float("x", 0, 1)} == lost and again.user_attrs[storage.START] == "lora"


def test_another_study_is_not_mixed_in(tmp_path) -> None:
    study(tmp_path / "journal")
    with pytest.raises(UserError, match="began with epochs=1, not 2"):
        study(tmp_path / "journal", {"epochs": 2})


@pytest.mark.parametrize("name", storage.SAMPLERS)
def test_samplers_know_spaces_with_switches(name, tmp_path) -> None:
    made, asked = study(tmp_path / "journal", method=name), space(names=["lora", "ia3"])
    for number in range(10):
        made.sampler = storage.sampler(name, number)
        one = made.ask()
        point = asked.suggest(one)
        made.tell(one, [float(point["lora"]), 10.0 * point["lora.size"]])
    assert len(made.trials) == 10 and all(one.state.name == "COMPLETE" for one in made.trials)


@pytest.mark.slow
def test_a_database_is_a_storage(tmp_path, model, data) -> None:
    url = f"sqlite:///{tmp_path / 'study.db'}"
    asked = settings(model, data, tmp_path / "out")
    assert tt.search(asked, trials=1, dev_share=0.3, methods=["ia3"], storage=url, worker=True, show=False) is None
    assert len(optuna.load_study(study_name=storage.STUDY, storage=url).trials) == 1
    assert not (tmp_path / "out" / "report.html").exists()


def _worker(model: str, data: str, folder: Path, journal: Path, count: int) -> subprocess.Popen[str]:
    words = ["search", "--model", model, "--data", data, "--output", str(folder), "--storage", str(journal), "--worker"]
    words += ["--trials", str(count), "--epochs", "6", "--eval-share", "0.2", "--dev-share", "0.3"]
    words += ["--max-length", "32"]
    return subprocess.Popen([sys.executable, "-m", "trimtab", *words], stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_two_workers_share_a_study_and_a_killed_one_costs_its_trial_only(tmp_path, model, data) -> None:
    journal, count = tmp_path / "journal", 10
    workers = [_worker(model, data, tmp_path / f"out{at}", journal, count) for at in range(2)]
    victim, limit = workers[0], time.monotonic() + 240
    while True:  # until the victim is in the middle of a trial
        assert time.monotonic() < limit
        time.sleep(0.1)
        if not journal.exists():
            continue
        trials_now = study_trials(journal)
        own = [one for one in trials_now if one.user_attrs.get(storage.OWNER, (0, 0))[1] == victim.pid]
        if any(one.state.name == "RUNNING" for one in own) and any(one.state.name == "COMPLETE" for one in trials_now):
            victim.send_signal(signal.SIGKILL)
            break
    victim.wait()
    _, said = workers[1].communicate(timeout=300)
    assert workers[1].returncode == 0, said
    states = [one.state.name for one in study_trials(journal)]
    assert states.count("COMPLETE") == count and states.count("FAIL") <= 1 and "RUNNING" not in states
    assert {one.user_attrs[storage.OWNER][1] for one in study_trials(journal)} <= {one.pid for one in workers}
    starts = [one.user_attrs.get(storage.START) for one in study_trials(journal) if one.state.name == "COMPLETE"]
    assert {one.name for one in MEMBERS} <= set(starts)


def study_trials(journal: Path) -> list[Any]:
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    try:
        kept = JournalStorage(JournalFileBackend(str(journal)))
        return list(optuna.load_study(study_name=storage.STUDY, storage=kept).trials)
    except KeyError:  # not made yet
        return []


# -- what goes wrong ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("--objective", "acuracy,parameters", "did you mean 'accuracy'? allowed: accuracy, macro_f1, mcc, loss, param"),
        ("--objective", "parameters", "the objectives need exactly one metric, such as accuracy"),
        ("--objective", "accuracy,accuracy", "twice"),
        ("--storage", "/nowhere/at/all", "the storage '/nowhere/at/all' cannot be reached: "),
        ("--storage", "nosuch://user:secret@host/name", "the storage 'nosuch://…@host/name' cannot be reached: "),
        ("--methods", "", "the space has no method in it"),
        ("--methods", "lroa", "did you mean 'lora'?"),
        ("--dev-share", "0.1", "has 19 rows, too few to rank architectures by; it needs 50"),
        ("--trials", "0", "trials must be at least 1, not 0"),
        ("--minutes", "-1", "minutes must be more than 0"),
        ("--points", "0", "points must be at least 1"),
        ("--max-share", "2", "max_share is a share of the parameters"),
        ("--sampler", "tpee", "did you mean 'tpe'? allowed: nsga2, tpe, gp, random"),
        ("--worker", None, "give --storage as well"),
    ],
)
def test_mistakes_are_one_sentence(tmp_path, model, data, option, value, said) -> None:
    given = {"--model": model, "--data": data, "--output": str(tmp_path / "out"), "--dev-share": "0.3"}
    given |= {"--max-length": "32", "--eval-share": "0.2", option: value}
    assert said in refused("search", *(word for pair in given.items() for word in pair if word is not None))
    assert not (tmp_path / "out").exists()


def test_a_space_of_what_the_family_cannot_have_is_empty() -> None:
    with pytest.raises(UserError, match="the space has nothing in it: none of prefix fits a bloom model"):
        space("bloom", ["prefix"])


def test_without_optuna_there_is_one_sentence(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(UserError, match=r"pip install 'trimtab\[search\]'"):
        storage.optuna()


# -- the command and its report -----------------------------------------------------------------------------------


def test_describe_runs_and_writes_nothing(tmp_path, model, data) -> None:
    done = run(
        "search",
        "--model",
        model,
        "--data",
        data,
        "--output",
        tmp_path / "out",
        "--describe",
        "--trials",
        "9",
        "--max-length",
        "32",
    )
    assert done.exit_code == 0, (done.output, done.exception)
    for said in ("lora       off, or size 1, 2, 4, 8", "ia3        off or on", "29,998 architectures", "9 trials"):
        assert said in done.stdout
    assert not (tmp_path / "out").exists()


def test_the_command_writes_a_report(finished, tmp_path, model, data) -> None:
    folder, found = finished
    layers = tuple(layer_map("lora[r=2,layers=1]|ia3", 2))
    found = dataclasses.replace(found, method="lora[r=2,layers=1]|ia3", layers=layers)
    report.write_report(found)
    made = (folder / "report.html").read_text()
    page = Page(made)
    assert "script" not in page.tags and "link" not in page.tags and "img" not in page.tags
    ids = [value for name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    text = " ".join(" ".join(page.text).split())
    for said in (
        "Which architecture?",
        "What was found",
        "layer 1 on 2 layer 0 on –",
        "All 5 trials",
        "accuracy, parameters",
    ):
        assert said in text, said
    if CHROMIUM is not None:
        assert opened(folder / "report.html").count("<svg") == made.count("<svg") > 0
    assert " ".join(found.recommendation.split()) in text
    assert all(" ".join(command.split()) in text for command in found.commands.values())
    assert made.count("<svg") == 5
    plain = json.loads((folder / "results.json").read_text())
    assert plain["method"] == found.method and len(plain["trials"]) == 5 and plain["layers"] == list(found.layers)
    lines = list(csv.DictReader((folder / "trials.csv").open()))
    assert [line["command"] for line in lines] == list(found.commands.values())
    assert sum(line["front"] == "1" for line in lines) == len(found.front)
    assert len(list(csv.DictReader((folder / "results.csv").open()))) == 2 * len(found.comparison.rows)


@pytest.mark.slow
def test_minutes_end_the_search(tmp_path, model, data) -> None:
    begun = time.monotonic()
    done = run("search", "--model", model, "--data", data, "--output", tmp_path / "out", "--minutes", "0.3",
               "--epochs", "1", "--eval-share", "0.2", "--dev-share", "0.3", "--max-length", "32")  # fmt: skip
    assert done.exit_code == 0, (done.output, done.exception)
    assert time.monotonic() - begun < 90
    assert "Take " in done.stdout and (tmp_path / "out" / "best" / "adapter_config.json").is_file()
