"""What a run shows while it trains: how far it is, how long it will take, and the phase of the KL terms' schedule."""

import itertools

from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_utils import has_length

from .bars import bar
from .schedules import phase, phases


SCHEDULE = ("beta", "gamma", "kl_order", "kl_warmup_steps", "kl_delay_steps")


def schedule_of(args, state):
    """
    The settings behind a run's [`phase`]s.

    Args:
        args (`TrainingArguments`): of the run.
        state (`TrainerState`): of the run.

    Returns:
        `tuple` or `None`: what follows `step` in the arguments of [`~trainer.schedules.phase`]; `None` of plain SFT.
    """
    if not hasattr(args, "kl_order"):
        return None
    return (max(state.max_steps, 1), *(getattr(args, name) for name in SCHEDULE))


def phase_behind(args, state):
    """The phase of the last step that was taken, whose numbers are logged now; `None` of plain SFT."""
    schedule = schedule_of(args, state)
    return None if schedule is None else phase(max(state.global_step - 1, 0), *schedule)


class Progress(ProgressCallback):
    """transformers' bars, as [`~trainer.bars.bar`] makes them, and the phase beside them."""

    def on_train_begin(self, args, state, control, **kwargs):
        self.current_step, self.phase = state.global_step, None
        self.schedule = schedule_of(args, state)
        if state.is_world_process_zero:
            self.training_bar = bar(
                total=state.max_steps, initial=state.global_step, desc="Training", dynamic_ncols=True
            )
            if self.schedule is not None:
                self.training_bar.write(f"Phases: {describe(phases(*self.schedule))}.")
            self._show_phase(state)

    def on_step_end(self, args, state, control, **kwargs):
        super().on_step_end(args, state, control, **kwargs)
        if state.is_world_process_zero and state.global_step < state.max_steps:
            self._show_phase(state)

    def _show_phase(self, state):
        if self.schedule is None or (now := phase(state.global_step, *self.schedule)) == self.phase:
            return
        if self.phase is not None:
            self.training_bar.write(f"Step {state.global_step + 1} of {state.max_steps}: {now}.")
        self.phase = now
        self.training_bar.set_postfix_str(now)

    def on_prediction_step(self, args, state, control, eval_dataloader=None, **kwargs):
        if not state.is_world_process_zero:
            return
        if self.prediction_bar is None:
            total = len(eval_dataloader) if has_length(eval_dataloader) else None  # of a stream
            leave = self.training_bar is None
            self.prediction_bar = bar(total=total, desc="Evaluating", leave=leave, dynamic_ncols=True)
        self.prediction_bar.update(1)

    def on_log(self, args, state, control, logs=None, **kwargs):
        super().on_log(args, state, control, logs=named(logs, args, state), **kwargs)


class Printer(PrinterCallback):
    """transformers' lines without a bar, with the phase in them."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        super().on_log(args, state, control, logs=named(logs, args, state), **kwargs)


def named(logs, args, state):
    """What is printed of a training step's logs: integrations that want numbers get them without the phase."""
    name = phase_behind(args, state) if logs and "loss" in logs else None
    return logs if name is None else {**logs, "phase": name}


def describe(found):
    """
    The phases of a run as one line.

    Args:
        found (`list[tuple[str, int, int]]`): see [`~trainer.schedules.phases`].

    Returns:
        `str`: steps counted from 1, both ends included.
    """
    return ", ".join(f"{name} (steps {start + 1} to {end})" for name, start, end in found)


def show_progress(trainer):
    """Puts ours in the place of the bar and of the printer that a [`~transformers.Trainer`] has made; a notebook's table stays."""
    for stock, ours in itertools.product(list(trainer.callback_handler.callbacks), (Progress, Printer)):
        if type(stock) is ours.__base__:
            trainer.remove_callback(stock)
            trainer.add_callback(ours)
