"""How the trainer's rows come: the same order for any number of workers and processes, gone on with where a run stopped."""

import functools
import itertools
import logging
import math
from pathlib import Path

import datasets
import torch
from accelerate.data_loader import prepare_data_loader
from torch.utils.data import DataLoader
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import seed_worker

from .collator import AMVLDataCollator
from .data.lengths import token_lengths
from .data.skipping import CountingCollator, NumberedCollator, NumberedRows, good_rows
from .data.step_batches import BY_LENGTH, step_batches
from .data.stream_batches import EvenBatch, StreamBatches


logger = logging.getLogger(__name__)

# How an error calls the rows, by transformers' key of their data loader.
NAMES = {"eval": "eval_dataset", None: "test_dataset"}


class LoadingMixin:
    """
    Replaces the training data loader of [`~transformers.Trainer`], whose order hangs on workers and processes.

    An epoch's order is a function of seed and epoch. Step s takes its rows from s * n on, n being the rows of a step, and shares
    them out among processes and accumulated batches; a resumed run of the same n starts at the next row, and decodes none before it.
    """

    _stream = None  # the training rows, if they are one: `StreamBatches`

    def _get_dataloader(
        self, dataset, description, batch_size, sampler_fn=None, is_training=False, dataloader_key=None
    ):
        is_stream = isinstance(dataset, datasets.IterableDataset)
        name = "train_dataset" if is_training else NAMES.get(dataloader_key, dataloader_key)
        if not (is_training or is_stream):
            if isinstance(dataset, datasets.Dataset):
                dataset = self._remove_unused_columns(dataset, description)
            rows, collator = NumberedRows(dataset), self.data_collator
            self.data_collator = NumberedCollator(collator, name)  # which transformers hands to its loader
            try:
                return super()._get_dataloader(rows, description, batch_size, sampler_fn, is_training, dataloader_key)
            finally:
                self.data_collator = collator
        args = self.args
        num_batches = args.gradient_accumulation_steps if is_training else 1
        # Without the processes that share a batch, of tensor or sequence parallelism.
        num_ranks = self.get_total_train_batch_size(args) // (
            self._train_batch_size * args.gradient_accumulation_steps
        )
        rank = args.process_index * num_ranks // args.world_size
        if is_stream:
            collate = self._get_collator_with_removed_columns(self.data_collator, description)
            is_shard = is_training and args.shard_stream and num_ranks > 1
            if is_training and num_ranks > 1 and args.process_index == 0:
                warn_of_shards(dataset.num_shards, num_ranks, is_shard)
            if is_shard:
                dataset, num_ranks, rank = dataset.shard(num_ranks, rank), 1, 0
            drop_last = is_shard or is_training and args.dataloader_drop_last
            if is_training and args.on_bad_row == "skip":
                choose = functools.partial(good_rows, collator=collate, most_in_a_row=args.max_skips_in_a_row)
                collate = CountingCollator(collate)
            else:
                choose, collate = enumerate, NumberedCollator(collate, name)
            rows = StreamBatches(dataset, batch_size, num_batches, num_ranks, rank, drop_last, not is_training, choose)
            settings = {"batch_size": None, "collate_fn": functools.partial(_collate, collate)}
        else:
            rows = NumberedRows(self._remove_unused_columns(dataset, description))
            others = rows if args.on_bad_row == "skip" else None
            collate = NumberedCollator(self.data_collator, name, others, args.max_skips_in_a_row)
            lengths = self._lengths_of(dataset) if args.train_sampling_strategy in BY_LENGTH else None
            batches = step_batches(
                args.train_sampling_strategy,
                len(dataset),
                lengths,
                args.seed if args.data_seed is None else args.data_seed,
                batch_size=batch_size,
                num_batches=num_batches,
                num_ranks=num_ranks,
                rank=rank,
                drop_last=args.dataloader_drop_last,
            )
            settings = {"batch_sampler": batches, "collate_fn": collate}
        if is_training:
            self._stream = rows if is_stream else None
        if args.dataloader_num_workers:
            settings |= {
                "persistent_workers": args.dataloader_persistent_workers and is_training,
                "prefetch_factor": args.dataloader_prefetch_factor,
                "multiprocessing_context": args.dataloader_multiprocessing_context,
                "worker_init_fn": functools.partial(
                    seed_worker, num_workers=args.dataloader_num_workers, rank=args.process_index
                ),
            }
        loader = DataLoader(
            rows,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
            in_order=args.dataloader_in_order,
            **settings,
        )
        # Processes are taken care of: accelerate only moves batches to the device.
        return prepare_data_loader(
            loader,
            self.accelerator.device,
            num_processes=1,
            process_index=0,
            put_on_device=True,
            dispatch_batches=False,
            non_blocking=args.accelerator_config.non_blocking,
        )

    def _lengths_of(self, dataset):
        args = self.args
        if args.length_column_name in dataset.column_names:
            return dataset[args.length_column_name][:]
        collator = AMVLDataCollator(self.processing_class, allow_text_only=args.allow_text_only_rows)
        with args.main_process_first(desc="counting tokens"):
            return token_lengths(dataset, collator, args.dataset_num_proc)

    def _get_eval_sampler(self, eval_dataset):
        if self.args.train_sampling_strategy in BY_LENGTH:  # evaluation rows stay in order, uncounted
            return None
        return super()._get_eval_sampler(eval_dataset)

    # -----------------------------------------------------------------------------------------------------------------
    # Going on, and the end of a stream
    # -----------------------------------------------------------------------------------------------------------------

    def _init_training_state(
        self, max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
    ):
        epochs, num_batches = super()._init_training_state(
            max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
        )
        if self.state.global_step == 0:
            return epochs, num_batches
        saved = TrainerState.load_from_json(str(Path(resume_from_checkpoint) / TRAINER_STATE_NAME))
        if self._stream is None:
            steps_per_epoch = saved.global_step / saved.epoch  # to one: an epoch's last step may have fewer batches
            if abs(steps_per_epoch - num_update_steps_per_epoch) > 1:
                logger.warning(
                    "`%s` is of a run with about %.0f steps in an epoch, and this one has %d: with other rows, or another "
                    "number of them in a step, some are seen twice or left out.",
                    resume_from_checkpoint,
                    steps_per_epoch,
                    num_update_steps_per_epoch,
                )
        elif num_batches:
            # Of a stream, transformers counts max_steps as one epoch: pass + steps of the pass / max_steps.
            epochs = math.ceil(saved.epoch) - 1
            num_batches = round((saved.epoch - epochs) * saved.max_steps) * self.args.gradient_accumulation_steps
            self._stream.skip(epochs, num_batches)
        return epochs, num_batches

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        if self._stream is None:
            return super().get_batch_samples(epoch_iterator, num_batches, device)
        batches = list(itertools.islice(epoch_iterator, num_batches))
        num_ended = torch.tensor([len(batches) < num_batches], dtype=torch.int64, device=device)
        if self.args.shard_stream and self.args.world_size > 1:
            num_ended = self.accelerator.gather(num_ended)
        if not num_ended.any():
            return super().get_batch_samples(iter(batches), num_batches, device)
        if self.state.global_step == 0:
            raise ValueError(
                "`train_dataset` is a stream that ends before the first step has its rows: give it more of them, take fewer in "
                "a step, or set `shard_stream` and `dataloader_drop_last` to `False`."
            )
        if not num_ended.all() and self.args.process_index == 0:
            logger.warning(
                "At step %d the shards of %d of %d processes are at their end; all begin again. What the others have left is "
                "passed over this time: shards of equal length leave nothing.",
                self.state.global_step,
                num_ended.sum().item(),
                len(num_ended),
            )
        # Begin the next pass, instead of asking for each step that is left of the run.
        self.control.should_epoch_stop = True
        return [], None


def _collate(collator, rows):
    """An empty batch for one that a resumed run skips; with `num_own_rows` where others fill it up."""
    batch = collator(rows) if rows else {}
    return batch | {"num_own_rows": rows.num_own} if isinstance(rows, EvenBatch) else batch


def check_loading(args, dataset):
    """
    Refuses settings under which rows would come wrongly, or not at all.

    Args:
        args ([`AMVLSFTConfig`]): settings.
        dataset (`Dataset`, `IterableDataset` or `None`): training rows.

    Raises:
        ValueError: the setting, and what to set.
    """
    config = args.accelerator_config
    if config.dispatch_batches:
        raise ValueError(
            "`dispatch_batches=True` slices batches by their first dimension, which is no row's in packed images: leave it out."
        )
    if config.split_batches:
        raise ValueError(
            "`split_batches=True` is not for this trainer, which settles itself which process gets which row: leave it out, and "
            "divide `per_device_train_batch_size` by the number of processes."
        )
    if not isinstance(dataset, datasets.IterableDataset):
        if isinstance(dataset, datasets.Dataset) and not len(dataset):
            raise ValueError("`train_dataset` has no rows: look at how it was filtered, and at the name of its split.")
        if args.shard_stream:
            raise ValueError("`shard_stream=True`, but `train_dataset` is no stream: set it to `False`.")
        return
    check_max_steps(args)
    if args.train_sampling_strategy in BY_LENGTH:
        raise ValueError(
            f"`train_sampling_strategy={args.train_sampling_strategy!r}` needs the lengths of all rows, which a stream does not "
            "have: read the dataset map-style, or leave it out."
        )
    if args.shard_stream and dataset.num_shards < args.world_size:
        raise ValueError(
            f"`shard_stream=True`, but `train_dataset` has {dataset.num_shards} shards (files) for {args.world_size} processes, "
            "some of which would get no rows: set it to `False`, where all read the whole stream, or write more files."
        )


def warn_of_shards(num_shards, num_ranks, is_shard):
    """Says, on the main process, what several processes read of a stream."""
    if is_shard and num_shards % num_ranks:
        logger.warning(
            "`shard_stream=True` deals %d shards to %d processes: those that get one more leave about as much unread in each "
            "pass. Write a multiple of %d files.",
            num_shards,
            num_ranks,
            num_ranks,
        )
    elif not is_shard:
        logger.warning(
            "Each of %d processes, and of their workers, reads the whole stream and decodes only its own images, so that the order "
            "does not hang on how many they are. It has %d shards: `shard_stream=True` %s.",
            num_ranks,
            num_shards,
            "reads less" if num_shards >= num_ranks else f"would read less, and needs {num_ranks}",
        )


def check_max_steps(args):
    """Refuses a stream whose end nobody knows, see [`check_loading`]."""
    if args.max_steps <= 0:
        raise ValueError(
            f"`max_steps` is {args.max_steps}, but a stream has no length from which steps could follow: set it."
        )
