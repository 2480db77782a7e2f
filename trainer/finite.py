"""A loss or a gradient that is not finite: the run stops with its last good step saved, or leaves the step out."""

import logging
import math


logger = logging.getLogger(__name__)


class FiniteMixin:
    """What a [`~transformers.Trainer`] does about `on_nan_loss`; all processes see the same numbers, and so do the same."""

    def _check_terms(self, sums):
        """`sums` of a batch, the same on all processes, before anything is computed from them."""
        if self.model.training and self._window is not None:
            names = [f"`{name}`" for name, (value, _) in sums.items() if not math.isfinite(value)]
            if names:
                self._drop(", ".join(names))

    def _get_grad_norm(self, model, grad_norm=None):
        grad_norm = super()._get_grad_norm(model, grad_norm)
        window = self._window
        # Under fp16 the scaler looks for infinite gradients, and leaves such steps out by itself.
        scaled = self.accelerator.scaler is not None
        if window["dropped"] is None and not scaled and grad_norm is not None and not math.isfinite(grad_norm):
            if self.is_deepspeed_enabled:  # its engine has taken the step by now: the last checkpoint stands
                self._saved_step = None
            self._drop("the norm of the gradient")
        if window["dropped"] is None:
            self._num_dropped_in_a_row = 0
            return grad_norm
        self._num_dropped += 1
        self._num_dropped_in_a_row += 1
        if self.is_world_process_zero():
            logger.warning("Step %d is dropped, since not finite: %s.", self.state.global_step + 1, window["dropped"])
        if not scaled:
            for parameter in model.parameters():
                parameter.grad = None  # neither momentum nor decay
        self._go_back(window)
        self._globalstep_last_logged += 1  # the mean that is logged next is one over the others
        return grad_norm

    def _drop(self, what):
        """Marks the step as one to leave out, or stops."""
        args, num_before = self.args, self._num_dropped_in_a_row
        if args.on_nan_loss == "skip" and num_before < args.max_skips_in_a_row:
            self._window["dropped"] = what
            return
        times = f", after {num_before} steps in a row that were dropped (`max_skips_in_a_row`)" if num_before else ""
        hint = "" if num_before else ", or drop such steps with `on_nan_loss='skip'`"
        error = FloatingPointError(
            f"Not finite at step {self.state.global_step + 1}: {what}{times}. Look at the rows of that step, lower "
            f"`learning_rate`{hint}."
        )
        self._save_last_step(error)
        raise error
