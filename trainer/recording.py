"""What a run logs of its batches: means over rows and tokens of all processes, none counted twice."""

import torch

from modeling_amvl.modeling_amvl import next_token_loss

from .objective import latent_statistics


class RecordingMixin:
    """Of a trainer: running means of the terms and of the latents, see [`AMVLSFTTrainer`] for what is logged."""

    _loaded_step = None  # of the best model, where that was loaded at the end
    _own_rows_of_stream = None  # of the evaluation's batch; a dataset's are counted by accelerate

    def _num_own_rows(self, num_rows):
        """Rows of a batch that are not there to fill up the last one of an evaluation, which several processes share."""
        state = self.accelerator.gradient_state
        if self.model.training or self.args.world_size == 1:
            return num_rows
        if self._own_rows_of_stream is not None:
            return self._own_rows_of_stream
        if not state.end_of_dataloader or state.remainder <= 0:
            return num_rows
        return min(max(state.remainder - self.args.process_index * num_rows, 0), num_rows)

    @torch.no_grad()
    def _record(self, outputs, inputs, num_items_in_batch, prior, posterior, beta, gamma):
        """Adds a batch to the running means, summed over devices."""
        mask, ids = inputs["completion_mask"].bool(), inputs["completion_ids"]
        num_own = self._num_own_rows(len(ids))
        has_fillers, first_rows = num_own < len(ids), slice(max(num_own, 1))
        mask, ids = mask[first_rows], ids[first_rows]
        prior, posterior = ([value[first_rows] for value in distribution] for distribution in (prior, posterior))
        num_rows, num_tokens = float(len(ids)), float(mask.sum())
        values = {name: (value, num_rows) for name, value in latent_statistics(prior, posterior).items()}
        values["beta"], values["gamma"] = (beta, num_rows), (gamma, num_rows)
        values["latent_norm_ratio"] = (
            outputs["latent_norm"][first_rows].mean().item() / self._embedding_norm,
            num_rows,
        )
        for source, prefix in (("posterior", ""), ("prior", "prior_"), ("no_latents", "no_latents_")):
            logits, loss = outputs.get(f"{prefix}logits"), outputs.get(f"{prefix}loss")
            if logits is None:
                continue
            logits = logits[first_rows]
            if has_fillers:
                loss = next_token_loss(logits, ids.masked_fill(~mask, -100))
            nll = loss.item() * (1.0 if num_items_in_batch is None else float(num_items_in_batch) / num_tokens)
            first = logits.argmax(-1) == ids
            values[f"token_accuracy_{source}"] = ((first & mask).sum().item() / num_tokens, num_tokens)
            if self.model.training:
                values["ntp" if source == "posterior" else f"ntp_{source}"] = (nll, num_tokens)
            else:
                values[f"nll_{source}"] = (nll, num_tokens)
                values[f"accuracy_{source}"] = ((first | ~mask).all(1).sum().item() / num_rows, num_rows)
        summed = torch.tensor([[value * weight, weight] for value, weight in values.values()], dtype=torch.float64)
        summed *= num_own > 0
        if self.args.world_size > 1:
            device = self.accelerator.device
            summed = self.accelerator.reduce(summed.to(device, torch.float32), reduction="sum").cpu()
        totals = self._totals["train" if self.model.training else "eval"]
        sums = dict(zip(values, summed.tolist(), strict=True))
        self._check_terms(sums)
        for name, (value, weight) in sums.items():
            totals[name][0] += value
            totals[name][1] += weight

    def log(self, logs, start_time=None):
        mode = "train" if self.model.training else "eval"
        for name, (value, weight) in self._totals[mode].items():
            self._metrics[mode][name] = [value / weight]
        self._totals[mode].clear()
        super().log(logs, start_time)
        self._note_evaluation(logs, self._step_of_weights())

    def _step_of_weights(self):
        return self.state.global_step if self._loaded_step is None else self._loaded_step

    def _note_evaluation(self, logs, step):
        """For the card: an evaluation's logs, and not the summary of a run that ends with one."""
        if "eval_nll_prior" in logs:
            self._last_evaluation = {key: value for key, value in logs.items() if isinstance(value, float)}
            self._last_evaluation["step"] = step
