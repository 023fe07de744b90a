"""Where a study lives and which of its trials are still being run. Knows Optuna's storages and processes; refuses to
know what a trial trains.

A study is in a journal file or in a database. Any number of processes add trials to it. Each notes on its trial which
process of which machine runs it, so a trial whose process is gone is told to have failed, and its point is put back in
the queue: a killed worker costs that trial only.
"""

from __future__ import annotations

import os
import socket
import warnings
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from trimtab.errors import UserError, unknown

STUDY = "trimtab"
ABOUT, OWNER, START = "about", "owner", "start"
"""Attributes: of the study what it searches, of a trial who runs it, and the name of the method it starts from."""
SAMPLERS = ("nsga2", "tpe", "gp", "random")
DEFAULT_SAMPLER = "tpe"
"""In a whole search it finds more than random points do (docs/search.md), and it knows of trials that are still run."""
STARTUP = 60.0
"""Seconds within which a trial gets its owner."""
LONGEST = 600.0
"""A trial of another machine is given up after so many seconds, or twenty times the longest finished one's."""


def optuna() -> Any:
    """The package, with its messages off. Raises UserError where it is not installed."""
    try:
        import optuna
    except ModuleNotFoundError:
        raise UserError("a search needs optuna, which is not installed: pip install 'trimtab[search]'") from None
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    return optuna


def sampler(name: str, seed: int) -> Any:
    """One of Optuna's samplers. Raises UserError for an unknown name."""
    samplers = optuna().samplers
    if name not in SAMPLERS:
        raise unknown("sampler", name, SAMPLERS)
    if name == "nsga2":
        return samplers.NSGAIISampler(seed=seed, population_size=12)
    if name == "tpe":
        return samplers.TPESampler(seed=seed, multivariate=True, n_startup_trials=8, constant_liar=True)
    if name == "gp":
        return samplers.GPSampler(seed=seed, n_startup_trials=8)
    return samplers.RandomSampler(seed=seed)


def reach(storage: str) -> Any:
    """Optuna's storage behind a journal file's path or a database's URL. Raises UserError where there is none."""
    library = optuna()
    try:
        if "://" in storage:
            return library.storages.RDBStorage(storage)
        return library.storages.JournalStorage(library.storages.journal.JournalFileBackend(os.path.expanduser(storage)))
    except Exception as error:  # each database has exceptions of its own
        reason = str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__
        raise UserError(f"the storage {_without_password(storage)!r} cannot be reached: {reason}") from error


def open_study(reached: Any, directions: Sequence[str], about: Mapping[str, Any], method: str, seed: int) -> Any:
    """The study in a storage, made if there is none. Raises UserError where it is a study of something else."""
    study = optuna().create_study(
        study_name=STUDY,
        storage=reached,
        sampler=sampler(method, seed),
        directions=list(directions),
        load_if_exists=True,
    )
    began = study.user_attrs.get(ABOUT)
    if began is None:
        study.set_user_attr(ABOUT, dict(about))
        return study
    for key in [*about, *began]:
        if began.get(key) != about.get(key):
            raise UserError(
                f"the study in this storage began with {key}={began.get(key)!r}, not {about.get(key)!r}; go on with "
                "the same settings, or choose another storage"
            )
    return study


def _without_password(storage: str) -> str:
    before, at, after = storage.rpartition("@")
    scheme, _, _ = before.partition("://")
    return f"{scheme}://…@{after}" if at and "://" in before else storage


# -- whose trial is running ---------------------------------------------------------------------------------------


def claim(trial: Any) -> None:
    """Note on a trial that this process runs it."""
    trial.set_user_attr(OWNER, [socket.gethostname(), os.getpid()])


def running(study: Any) -> int:
    """The trials that are being run; those of processes that are gone are told to have failed and put back in the
    queue.
    """
    library = optuna()
    states = library.trial.TrialState
    trials = study.get_trials(deepcopy=False)
    took = [one.duration.total_seconds() for one in trials if one.state == states.COMPLETE and one.duration]
    patience = max(LONGEST, 20 * max(took, default=0.0))
    alive = 0
    for trial in trials:
        if trial.state != states.RUNNING:
            continue
        if _is_alive(trial, patience):
            alive += 1
        else:
            give_up(study, trial)
    return alive


def give_up(study: Any, trial: Any) -> None:
    """Tell that a running trial failed, and queue its point again; nothing where another process was faster."""
    library = optuna()
    try:
        study.tell(trial.number, state=library.trial.TrialState.FAIL)
    except (ValueError, library.exceptions.UpdateFinishedTrialError):
        return
    if trial.params:
        kept = {key: value for key, value in trial.user_attrs.items() if key == START}
        study.enqueue_trial(trial.params, user_attrs=kept)


def _is_alive(trial: Any, patience: float) -> bool:
    age = (datetime.now() - trial.datetime_start).total_seconds()
    owner = trial.user_attrs.get(OWNER)
    if owner is None:
        return age < STARTUP
    host, process = owner
    if host != socket.gethostname():
        return age < patience
    if process == os.getpid():  # a process runs one trial at a time, and not while it looks at others
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's, so it is there
        return True
    return True
