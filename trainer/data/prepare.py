"""Writes a mixture as sharded parquet with its images inline: in parallel, resumable, with a report and a dataset card."""

import json
import multiprocessing
import os
import shutil
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock, Timeout
from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

from model_cards import render_dataset_card

from ..bars import bar
from .files import is_hub_id
from .mixture import SPLITS, hashes_of, licences_of, warn_of_empty
from .report import DataReport, write_atomically
from .report_page import draw_contact_sheet, save_report
from .rows import FEATURES


ON_THE_HUB = "sources on the Hub"  # in the settings of a report
ROW_GROUP = 50  # rows that are read at once, images included


def prepare(mixture, output_dir, num_proc=1, repository=None):
    """
    Reads a mixture and writes it as a dataset: `data/train-*.parquet`, `data/test-*.parquet`, `README.md`, `report.json`,
    `report.html` and `contact_sheet.jpg`.

    A run that was cut short goes on where it stopped when it is started again.

    Args:
        mixture ([`Mixture`]): what to read.
        output_dir (`str` or `Path`): a new folder, or one of a run of the same mixture.
        num_proc (`int`, defaults to 1): processes that read.
        repository (`str`, *optional*): where it will be pushed to, for its card.

    Returns:
        `dict[str, DataReport]`: of each split.

    Raises:
        ValueError: `output_dir` holds something else; nothing can be trained on; a bad row, if `bad_rows` is `"raise"`.
    """
    if isinstance(num_proc, bool) or not isinstance(num_proc, int) or num_proc < 1:
        raise ValueError(f"`num_proc` must be at least 1, got {num_proc!r}.")
    output_dir = Path(output_dir)
    if output_dir.exists() and not output_dir.is_dir():
        raise ValueError(f"`output_dir` ({output_dir}) is a file: name a folder.")
    processor = mixture.load_processor()
    work = output_dir / "work"
    readers = {split: mixture.readers(split, work / split, processor) for split in SPLITS}
    _claim(output_dir, mixture, readers)
    try:
        with FileLock(work / "lock", timeout=0):
            return _prepare(mixture, output_dir, readers, num_proc, repository)
    except Timeout as error:
        raise ValueError(f"`output_dir` ({output_dir}) is being written by another process: wait for it.") from error


def _prepare(mixture, output_dir, readers, num_proc, repository):
    work, hashes = output_dir / "work", []
    for split in reversed(SPLITS):  # the images of the evaluation rows come first
        for reader in readers[split]:
            reader.evaluation_hashes = hashes
        _run(_tasks_of(readers[split]), readers[split], output_dir, num_proc, split)
        if split == "test":
            hashes = [
                int(text, 16) for path in sorted((work / split).glob("*.done.json")) for text in _read(path)["hashes"]
            ]
    settings = {name: getattr(mixture, name) for name in ("answer", "processor", "min_pixels", "max_pixels")}
    if mixture.processor and Path(mixture.processor).exists():
        settings["processor"] = Path(mixture.processor).name  # where it lies is nobody else's business
    addresses = dict.fromkeys(reader.files.hub_address for reader in readers["train"] if reader.files.hub_address)
    settings[ON_THE_HUB] = " ".join(addresses) or None
    reports = {
        split: DataReport(work / split, licences_of(readers[split]), settings=settings)
        for split in SPLITS
        if readers[split]
    }
    for report in reports.values():
        warn_of_empty(report)
    if not sum(reports["train"].kept.values()):
        raise ValueError(f"the mixture has no row that can be trained on: {reports['train']}")
    for split in reports:
        _publish(work / split, output_dir / "data", split)
    _describe(output_dir, reports, repository)
    return reports


def make_repository(repository, private=False):
    """
    Makes the dataset repository if it does not exist, before anything is spent.

    Args:
        repository (`str`): `"user/name"`.
        private (`bool`, defaults to `False`): only for a new one.

    Returns:
        `str`: its address.

    Raises:
        ValueError: no name of a repository, or none that may be written to.
    """
    try:
        return str(HfApi().create_repo(repository, repo_type="dataset", private=private, exist_ok=True))
    except (HFValidationError, HfHubHTTPError, LocalTokenNotFoundError, OSError) as error:
        raise ValueError(f"`push_to_hub` is {repository!r}, to which nothing can be pushed: {error}") from error


def push(output_dir, repository, private=False):
    """
    Pushes what [`prepare`] wrote to the Hub, as a dataset.

    Args:
        output_dir (`str` or `Path`): the folder.
        repository (`str`): `"user/name"`; made if it does not exist.
        private (`bool`, defaults to `False`): only for a new one.

    Returns:
        `str`: its address.
    """
    url = make_repository(repository, private)
    HfApi().upload_folder(
        repo_id=repository,
        repo_type="dataset",
        folder_path=str(output_dir),
        ignore_patterns=["work/**"],
        delete_patterns=["data/*.parquet"],  # shards of an earlier, longer mixture
        commit_message="Upload a mixture prepared with AMVL",
    )
    return url


def _claim(output_dir, mixture, readers):
    """Makes the folder this mixture's, or finds that it is."""
    described = asdict(mixture)
    for source in (*described["sources"], *described["evaluation"]):
        source.pop("licence", None)  # may be corrected
    settings = {
        "mixture": described,
        "versions": {split: [reader.versions() for reader in readers[split]] for split in SPLITS},
        "shards": {
            split: [[list(shard) for shard in reader.all_shards] for reader in readers[split]] for split in SPLITS
        },
    }
    path = output_dir / "work" / "mixture.json"
    settings = json.loads(json.dumps(settings, default=str))
    if path.exists():
        if _read(path) != settings:
            raise ValueError(
                f"`output_dir` ({output_dir}) was begun with another mixture, or its sources have changed since: take "
                "another folder, or delete this one."
            )
    elif output_dir.exists() and any(output_dir.iterdir()):
        raise ValueError(f"`output_dir` ({output_dir}) is not empty: take a new folder.")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(settings, indent=1))


def _tasks_of(readers):
    """Reader and shard of each task, the sources interleaved, so that the files in order are a mixture, too."""
    tasks = [
        ((place + 0.5) / len(reader.all_shards), number, place)
        for number, reader in enumerate(readers)
        for place in range(len(reader.all_shards))
    ]
    return [(number, place) for _, number, place in sorted(tasks)]


def _run(tasks, readers, output_dir, num_proc, split):
    folder = output_dir / "work" / split
    folder.mkdir(parents=True, exist_ok=True)
    for scratch in folder.glob(".*"):  # of a process that was killed
        scratch.unlink()
    names = [f"{index:05d}" for index in range(len(tasks))]
    done = {name: note["rows"] for name in names if (note := _note_of(folder, output_dir / "data", name)) is not None}
    left = [(name, number, place) for name, (number, place) in zip(names, tasks) if name not in done]
    rows = sum(done.values())
    with bar(total=len(tasks), initial=len(done), desc=f"{split}: shards", disable=not tasks) as progress:
        progress.set_postfix(rows=rows)
        for num_rows in _each(left, readers, folder, split == "test", min(num_proc, len(left) or 1)):
            rows += num_rows
            progress.set_postfix(rows=rows)
            progress.update()


def _note_of(folder, data, name):
    """What was noted of a shard, if it is done and its rows are still there."""
    path = folder / f"{name}.done.json"
    if not path.exists():
        return None
    note = _read(path)
    is_there = (folder / f"{name}.parquet").exists() or (data / note.get("file", "")).is_file()
    return note if is_there or not note["rows"] else None


def _each(left, readers, folder, with_hashes, num_proc):
    if num_proc == 1:
        for name, number, place in left:
            yield _write_shard(readers[number], place, folder, name, with_hashes)
        return
    # Not forks of this process, whose threads (of torch, of tokenizers) they would lack, but of a fresh one.
    has_server = "forkserver" in multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if has_server else "spawn")
    if has_server:
        context.set_forkserver_preload([__name__])
    with ProcessPoolExecutor(num_proc, context, initializer=_keep, initargs=(readers,)) as pool:
        futures = [pool.submit(_write_kept, number, place, folder, name, with_hashes) for name, number, place in left]
        try:
            for future in as_completed(futures):
                yield future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


_kept_readers = []


def _keep(readers):
    """Of a process that reads: gets the readers once, instead of with each shard."""
    _kept_readers[:] = readers


def _write_kept(number, *arguments):
    return _write_shard(_kept_readers[number], *arguments)


def _write_shard(reader, place, folder, name, with_hashes):
    """Writes one shard, whole or not at all, and then the note that it is done."""
    shard = reader.all_shards[place]
    path, scratch = folder / f"{name}.parquet", folder / f".{name}.{os.getpid()}"
    schema = FEATURES.arrow_schema
    num_rows, group = 0, []
    with pq.ParquetWriter(scratch, schema) as writer:
        for row in reader.rows(shard):
            group.append({**row, "images": [_inline(image) for image in row["images"]]})
            num_rows += 1
            if len(group) == ROW_GROUP:
                writer.write_table(pa.Table.from_pylist(group, schema=schema))
                group = []
        if group:
            writer.write_table(pa.Table.from_pylist(group, schema=schema))
    os.replace(scratch, path)
    hashes = [f"{image:x}" for image in hashes_of(reader, shard)] if with_hashes else []
    write_atomically(folder / f"{name}.done.json", json.dumps({"rows": num_rows, "hashes": hashes}))
    return num_rows


def _inline(image):
    if image["bytes"] is not None:
        return image
    path = Path(image["path"])
    return {"bytes": path.read_bytes(), "path": path.name}


def _publish(folder, data, split):
    """Moves the shards that have rows to their final names; a run cut short here goes on, too."""
    data.mkdir(exist_ok=True)
    names = [path.name.removesuffix(".done.json") for path in sorted(folder.glob("*.done.json"))]
    notes = {name: note for name in names if (note := _read(folder / f"{name}.done.json"))["rows"]}
    for number, (name, note) in enumerate(notes.items()):
        file = f"{split}-{number:05d}-of-{len(notes):05d}.parquet"
        if (folder / f"{name}.parquet").exists():
            os.replace(folder / f"{name}.parquet", data / file)
            write_atomically(folder / f"{name}.done.json", json.dumps({**note, "file": file}))


def _describe(output_dir, reports, repository):
    titles = {"train": f"{output_dir.name}: training rows", "test": f"{output_dir.name}: evaluation rows"}
    pages = {}
    for split, report in reports.items():
        scratch = output_dir / "work" / f"{split}-report"
        save_report(report, scratch, titles[split])
        pages[split] = scratch
    for split, scratch in pages.items():
        name = "report" if split == "train" else "report_test"
        os.replace(scratch / "report.json", output_dir / f"{name}.json")
        os.replace(scratch / "report.html", output_dir / f"{name}.html")
        shutil.rmtree(scratch)
    draw_contact_sheet(reports["train"], output_dir / "contact_sheet.jpg")
    card = render_dataset_card(
        output_dir.name,
        {split: report.to_dict() for split, report in reports.items()},
        reports["train"].settings,
        repository,
    )
    card.save(output_dir / "README.md")


def _read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def report_of(name, revision=None):
    """
    The `report.json` of a prepared dataset.

    Args:
        name (`str`): the folder, or the dataset's id on the Hub.
        revision (`str`, *optional*): of the latter.

    Returns:
        `dict`: what `DataReport.to_dict` gave.

    Raises:
        ValueError: the dataset was not prepared here.
    """
    path = Path(name) / "report.json"
    try:
        if is_hub_id(name):
            path = Path(hf_hub_download(name, "report.json", repo_type="dataset", revision=revision))
        return _read(path)
    except (OSError, HfHubHTTPError, json.JSONDecodeError) as error:
        raise ValueError(
            f"`{name}` has no `report.json`, as what recipes/prepare_data.py writes has: prepare it, or name its own "
            f"`dataset_format`. ({error})"
        ) from error
