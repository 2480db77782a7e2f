"""Parameters that DeepSpeed's ZeRO-3 has shared out over the processes, whole for a moment."""

import contextlib


@contextlib.contextmanager
def whole(*parameters):
    """
    While open, parameters have their values, however they are kept; what is changed stays changed.

    A backbone that is loaded under ZeRO-3 is shared out from the start: its parameters have no element. DeepSpeed gives them the
    methods that bring them together, so that nothing of it is imported here.

    Args:
        *parameters (`torch.nn.Parameter`): every process has to open the same ones, and to change them alike.
    """
    shared_out = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    if not shared_out:
        yield
        return
    shared_out[0].all_gather(param_list=shared_out)
    try:
        yield
    finally:
        shared_out[0].partition(param_list=shared_out, has_been_updated=True)
