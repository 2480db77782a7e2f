"""What each part of AMVL is worth on the embedded benchmark, beside controls, over seeds.

    python recipes/ablate_amvl.py --output_dir ablation

Every row of the paper's ablation, the defaults one by one, k, d, tau, same-data SFT and pause tokens: each arm trains from the
base that ships with this project, as many steps on the same rows, and is asked about held-out photographs with its own latents,
with another row's, and with those of a posterior that has read a right or a wrong answer. One arm and seed after the other, as
many at a time as there are processors; what is done is kept, and the same command goes on where it was cut off. Writes RESULTS.md,
ablation.png and results.json. Offline, on CPUs; needs `pip install -e '.[demo]'`.
"""

import json
import multiprocessing
import os
import subprocess
import threading
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from datetime import date
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory

from filelock import FileLock, Timeout
from trl import TrlParser

from trainer.ablation.arms import ARMS
from trainer.ablation.page import draw, summarise, table, temperatures, verdict
from trainer.bars import bar, quiet_libraries
from trainer.data.report import write_atomically
from trainer.measuring import facts_line, machine_facts


REPOSITORY = Path(__file__).resolve().parents[1]


@dataclass
class AblationArguments:
    """How much of it."""

    output_dir: str = field(default="ablation", metadata={"help": "Where runs, table and picture go."})
    arms: list[str] | None = field(default=None, metadata={"help": "Names of arms; all by default."})
    num_seeds: int = field(
        default=3,
        metadata={"help": "Seeds of every arm, from 1: with 0 the base was trained."},
    )
    num_main_seeds: int = field(
        default=5, metadata={"help": "Seeds of the default and the controls it is held against."}
    )
    num_steps: int = field(default=500, metadata={"help": "Optimiser steps."})
    num_train_rows: int = field(default=8000, metadata={"help": "Rows about training photographs."})
    num_test_rows: int = field(default=1000, metadata={"help": "Rows about held-out photographs."})
    batch_size: int = field(default=64, metadata={"help": "Rows per step."})
    learning_rate: float = field(default=1e-3, metadata={"help": "Peak of the cosine schedule."})
    num_processes: int = field(
        default_factory=lambda: os.cpu_count() or 1, metadata={"help": "Arms that are trained at a time."}
    )

    def __post_init__(self):
        for name in ("num_seeds", "num_main_seeds", "num_steps", "num_train_rows", "batch_size", "num_processes"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
        if self.num_test_rows < 4:
            raise ValueError(f"`num_test_rows` must be at least 4, two of each kind, got {self.num_test_rows}.")
        if not 0 < self.learning_rate < float("inf"):
            raise ValueError(f"`learning_rate` must be above 0, got {self.learning_rate}.")
        known = [arm.name for arm in ARMS]
        unknown = [name for name in self.arms or [] if name not in known]
        if unknown or self.arms == []:
            raise ValueError(f"`arms` has {unknown}: name some of {known}, each in quotes, or leave it out for all.")

    @property
    def budget(self):
        """What every arm and seed share; results under another one are not comparable."""
        names = ("num_steps", "num_train_rows", "num_test_rows", "batch_size", "learning_rate")
        return {name: getattr(self, name) for name in names}


def plan(arguments):
    """The arms and seeds to run, in an order in which the first results already make a table."""
    chosen = [arm for arm in ARMS if arguments.arms is None or arm.name in arguments.arms]
    most = max(arguments.num_seeds, arguments.num_main_seeds)
    return [
        (arm, seed)
        for seed in range(1, most + 1)
        for arm in chosen
        if seed <= (most if arm.main else arguments.num_seeds)
    ]


def record_path(folder, arm, seed):
    name = "".join(letter if letter.isalnum() else "-" for letter in arm.name)
    return folder / "runs" / f"{name}-seed{seed}.json"


def read_record(path, arm, seed, budget):
    """
    What was measured of an arm and seed, `None` where it was not run.

    Raises:
        ValueError: it was run with other settings.
    """
    if not path.exists():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        ran = {name: record[name] for name in ("arm", "seed", "budget")}
        if not record["right"]["own"] or not record["commit"]:
            raise KeyError("right")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"`{path}` is no record of a run ({error!r}): remove the file to run it again.") from error
    asked = {"arm": arm.settings, "seed": seed, "budget": budget}
    differ = [name for name in asked if ran[name] != asked[name]]
    if differ:
        raise ValueError(
            f"`{path}` was run with {[ran[name] for name in differ]}, and {[asked[name] for name in differ]} is asked for: use "
            "another `output_dir`, or remove the file to run it again."
        )
    return record


def run_and_keep(arm, seed, budget, path):
    """Trains and measures an arm in a process of its own, and writes its record."""
    from trainer.ablation.run import run_arm  # loads what the parent does not need

    source = {"commit": commit(), "date": date.today().isoformat()}  # before it trains: the checkout may change
    with TemporaryDirectory(prefix="amvl-ablation-") as scratch:
        found = run_arm(arm, seed, **budget, output_dir=scratch)
    write_atomically(path, json.dumps({"arm": arm.settings, "seed": seed, "budget": budget, **source, **found}))


def follow_parent():
    """Ends this process with the one that started it, which a pool's processes would outlive where it is killed."""
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def finished(future, arm, seed):
    """Raises what a run raised, and says which it was."""
    try:
        future.result()
    except BrokenProcessPool as error:
        error.add_note("A process that trained was killed, by want of memory perhaps: lower `num_processes`.")
        raise
    except BaseException as error:
        error.add_note(f"This was {arm.name!r} with seed {seed}; the same command goes on with it.")
        raise


def commit():
    """The commit of this checkout, with a mark where files differ from it; `"unknown"` outside of git."""
    command = ["git", "-C", str(REPOSITORY), "describe", "--always", "--dirty", "--exclude", "*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def write_page(folder, arguments, records):
    """RESULTS.md, ablation.png and results.json of what has been run."""
    summary, runs = summarise(records), [record for by_seed in records.values() for record in by_seed.values()]
    facts = facts_line(machine_facts())
    commits, days = (sorted({record[name] for record in runs}) for name in ("commit", "date"))
    draw(summary, ARMS, folder / "ablation.png")
    settings = {**arguments.budget, "commits": commits, "dates": days}
    results = {"settings": settings, "machine": facts, "verdict": verdict(summary), "arms": summary}
    write_atomically(folder / "results.json", json.dumps(results, indent=1) + "\n")
    budget = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in arguments.budget.items())
    seconds = [record["seconds_per_step"] for record in runs]
    page = f"""\
# What each part is worth

Written by `python recipes/ablate_amvl.py`, whose docstring says what is compared; {" to ".join(days)}, commit {", ".join(commits)}.
{facts}. {budget}; {len(runs)} runs, {min(seconds):.2f} to {max(seconds):.2f} s a step, {arguments.num_processes} at a time.

{verdict(summary)}

![Accuracy of every arm on questions of two steps](ablation.png)

{table(summary, ARMS)}

Accuracy on held-out photographs in per cent, differences in points, with Student's 95% interval over seeds, which is wide where some
seeds get there and others do not; results.json has the value of each. Rows, their order and the initial heads differ from seed
to seed and are the same for all arms of one. The base was taught *1 step* and never asked *2 steps*. *minus SFT*, *minus AMVL*: 2 steps,
minus same-data SFT, and minus the default, of the same seed. *another's Z*: what it costs on 2 steps when each row answers with another
row's latents. *posterior Z*: 2 steps, with latents that have read the right answer. *off*: 2 steps, the same weights without latents.
*copied*: how often the answer is the wrong one that the posterior has read, and how often it is that one anyway, over both
kinds: the difference is the leak. Guessing among the colours that can be the answer gives 16.7 on 2 steps. *prior-decoded loss alone* has
neither posterior nor KL: a second pass through the same layers, and nothing variational.

Temperature of the default's latents, 2 steps:

{temperatures(summary)}
"""
    write_atomically(folder / "RESULTS.md", page)
    return page


def main(arguments):
    folder = Path(arguments.output_dir)
    (folder / "runs").mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ValueError(
            f"`output_dir` is {folder}, where another process runs the ablation: use another one."
        ) from None
    with lock:
        runs, records = plan(arguments), defaultdict(dict)
        # What was run before is shown, too, whatever is asked for now.
        for arm, seed in product(ARMS, range(1, max(arguments.num_seeds, arguments.num_main_seeds) + 1)):
            record = read_record(record_path(folder, arm, seed), arm, seed, arguments.budget)
            if record is not None:
                records[arm.name][seed] = record
        missing = [(arm, seed) for arm, seed in runs if seed not in records.get(arm.name, {})]
        print(f"{len(runs)} runs, {len(runs) - len(missing)} of them done, {arguments.num_processes} at a time.")
        os.environ["TQDM_DISABLE"] = "1"  # in the processes that train; the bar here says how far all of it is
        spawn = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
        with ProcessPoolExecutor(arguments.num_processes, mp_context=spawn, initializer=follow_parent) as pool:
            futures = {
                pool.submit(run_and_keep, arm, seed, arguments.budget, record_path(folder, arm, seed)): (arm, seed)
                for arm, seed in missing
            }
            try:
                for future in bar(as_completed(futures), total=len(futures), desc="Runs", disable=not futures):
                    arm, seed = futures[future]
                    finished(future, arm, seed)
                    path = record_path(folder, arm, seed)
                    records[arm.name][seed] = read_record(path, arm, seed, arguments.budget)
                    write_page(folder, arguments, records)
            finally:
                pool.shutdown(wait=False, cancel_futures=True)  # whatever went wrong, no further run is begun
        print("\n" + write_page(folder, arguments, records))


if __name__ == "__main__":
    quiet_libraries()
    main(*TrlParser((AblationArguments,)).parse_args_and_config())
