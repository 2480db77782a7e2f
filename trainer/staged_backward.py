"""A step's backward pass in stages, so that no gradient of a weight waits for another pass through it.

Prompt, posterior and decoders run through the same weights, and autograd adds a weight's gradients up before it hands them on: in one
backward pass all of them wait, whole on every GPU whatever the engine, until the prompt's own comes last. For 72 billion weights that
is more than a GPU has. In stages each of them is handed on layer by layer, as that of a single forward is; an engine that shares
gradients out does so once in each stage.
"""

import torch
from peft import PeftModel


class _StoredGradients(torch.autograd.Function):
    """Zero, whose backward pass hands each tensor the gradient that its leaf got, scaled as it was."""

    @staticmethod
    def forward(ctx, gradients, *tensors):
        ctx.gradients = gradients
        return tensors[0].new_zeros((), dtype=torch.float32)

    @staticmethod
    def backward(ctx, _):
        gradients, ctx.gradients = ctx.gradients, None
        return None, *gradients


def rest_of(pairs):
    """
    A loss of value 0 that takes the backward pass on from a cut.

    Args:
        pairs (`list[tuple[torch.Tensor, torch.Tensor]]`): a stage of [`Cuts`], whose leaves have their gradients.

    Returns:
        `torch.Tensor`: scalar; or `None` where no leaf has got one.
    """
    reached = [(tensor, leaf.grad) for tensor, leaf in pairs if leaf.grad is not None]
    if not reached:
        return None
    tensors, gradients = zip(*reached)
    return _StoredGradients.apply(gradients, *tensors)


def nodes_below(roots):
    """The nodes of the graph of some tensors, without those that several stages may pass: leaves', and casts of leaves."""
    found, waiting = set(), [root.grad_fn for root in roots if root.grad_fn is not None]
    while waiting:
        node = waiting.pop()
        if node in found or _is_of_leaf(node):
            continue
        found.add(node)
        waiting += [following for following, _ in node.next_functions if following is not None]
    return found


def _is_of_leaf(node):
    """Whether a node collects a leaf's gradient, or casts a leaf, which saves nothing: autocast keeps one cast for all branches."""
    below = [following for following, _ in node.next_functions if following is not None]
    is_cast = node.name() == "ToCopyBackward0" and all(hasattr(following, "variable") for following in below)
    return hasattr(node, "variable") or is_cast


def stages_are_apart(outputs):
    """
    Whether no backward pass of a stage would run into the graph of another.

    Args:
        outputs ([`AMVLOutput`]): of a step with `in_stages=True`, which may have cut nothing.
    """
    cuts = outputs.get("cuts")
    if cuts is None:
        return False
    decoded = [[outputs[name]] for name in ("loss", "prior_loss") if outputs.get(name) is not None]
    graphs = [nodes_below(roots) for roots in (*decoded, *([tensor for tensor, _ in pairs] for pairs in cuts.stages))]
    return sum(map(len, graphs)) == len(set().union(*graphs))


def run_stages(terms, cuts, backward):
    """
    Runs the backward passes of a step but for the last, the prompt's.

    Args:
        terms (`dict[str, torch.Tensor]`): of the loss, see [`amvl_loss`].
        cuts ([`Cuts`]): of [`AMVLOutput`].
        backward (`Callable`): runs the backward pass of a scalar, on top of gradients that are there.

    Returns:
        `torch.Tensor`: a scalar of value 0 whose backward pass is what is left.
    """
    for name in ("ntp", "prior_ntp"):
        if name in terms:
            backward(terms[name])
    waiting = [terms["forward"], terms["reverse"]]
    for pairs in cuts.stages:
        losses = [loss for loss in (*waiting, rest_of(pairs)) if loss is not None and loss.requires_grad]
        if pairs is cuts.stages[-1]:
            return sum(losses, start=torch.zeros((), requires_grad=True))  # a frozen backbone may have nothing left
        if losses:
            backward(sum(losses))
        waiting = []


class StagedBackwardMixin:
    """
    Of a trainer: `training_step` runs the backward pass in stages where weights are trained whole.

    Not with an adapter, whose gradients are small; not under DDP and ZeRO-3, which take one backward pass for each forward; not with
    optimisers that step within the backward pass; and not on a backbone whose branches read more of the prompt than its cache, which
    the first step finds out.
    """

    _in_stages = False
    _stages_are_apart = None  # not known before the first step

    def training_step(self, model, inputs, num_items_in_batch=None):
        self._in_stages = self._allows_stages() and self._stages_are_apart is not False
        try:
            return super().training_step(model, inputs, num_items_in_batch)
        finally:
            self._in_stages = False

    def _allows_stages(self):
        steps_in_backward = any(word in self.args.optim.value for word in ("lomo", "layerwise"))
        if steps_in_backward or isinstance(self.model, PeftModel):
            return False
        if self.is_deepspeed_enabled:
            return self.accelerator.deepspeed_plugin.zero_stage < 3
        return self.is_fsdp_enabled or (self.args.world_size == 1 and self.args.n_gpu <= 1)

    def _forward(self, model, **inputs):
        # Not passed otherwise: remote code of an earlier release does not know it.
        stages = {"in_stages": True} if self._in_stages else {}
        outputs = model(**inputs, **stages)
        if self._in_stages and self._stages_are_apart is None:
            self._stages_are_apart = stages_are_apart(outputs)
            if outputs.get("cuts") is not None and not self._stages_are_apart:
                outputs = None  # before another forward takes as much
                outputs = model(**inputs)
        return outputs

    def _run_stages(self, terms, cuts):
        """See [`run_stages`], under the engine in use."""
        rest = run_stages(terms, cuts, self._backward)
        self._gather_outside_of_layers()
        return rest

    def _backward(self, loss):
        self._gather_outside_of_layers()
        if self.is_deepspeed_enabled:  # and no step of its optimiser, which is the last stage's
            self.accelerator.deepspeed_engine_wrapped.backward(loss, sync_gradients=False, scale_wrt_gas=False)
        else:
            self.accelerator.backward(loss)

    def _gather_outside_of_layers(self):
        """Brings together what FSDP2 shares out again after each backward pass; layers see to that by themselves."""
        if self.is_fsdp_enabled:
            self.model_wrapped.unshard()
