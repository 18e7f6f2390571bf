"""Run in a PyTorch user's environment: inputs, outputs and every module's activation into one file.

Needs torch and numpy only; copy this file beside your script, or `import jaxmodels.interop.record`:

    from record import record
    record(model.eval(), torch.randn(1, 3, 224, 224), path="io.npz")

and then `python -m jaxmodels compare NAME --weights FILE --io io.npz`. The file holds `in.<name>`,
`out.<name>`, `act.<module path>` (with `#1`, `#2`, ... where a module was called more than once)
and `layout`, a JSON object that names the axes of each array.
"""

from __future__ import annotations

import inspect
import json
import os
import tempfile

import numpy as np

_CHANNELS_LAST = ("Linear", "LayerNorm", "Embedding", "Softmax", "GELU", "MultiheadAttention")


def axes(shape: tuple[int, ...], channels_last: bool = False) -> str:
    """Names of the axes of an array: N batch, C channels, L length, D H W space."""
    if len(shape) == 3:
        return "NLC" if channels_last else "NCL"
    if channels_last or len(shape) not in (4, 5):
        return {0: "", 1: "N", 2: "NC", 4: "NHWC", 5: "NDHWC"}.get(len(shape), "N" * len(shape))
    return {4: "NCHW", 5: "NCDHW"}[len(shape)]


def _first_tensor(value):
    import torch

    if isinstance(value, torch.Tensor):
        return value
    values = value.values() if isinstance(value, dict) else value
    if isinstance(value, (tuple, list, dict)):
        for item in values:
            found = _first_tensor(item)
            if found is not None:
                return found
    return None


def _array(tensor):
    import torch

    tensor = tensor.detach().cpu()
    if tensor.dtype == torch.bfloat16:
        tensor = tensor.float()  # exact, and NumPy has no bfloat16
    return tensor.numpy().copy()


def _named(prefix, value, arrays, names=()):
    """`out.logits` for dicts, `out.0`, `out.1` for tuples, `out.output` for one tensor."""
    import torch

    if isinstance(value, torch.Tensor):
        arrays[f"{prefix}.{names[0] if names else 'output'}"] = _array(value)
        return
    pairs = value.items() if hasattr(value, "items") else enumerate(value)
    for n, (key, item) in enumerate(pairs):
        if isinstance(item, torch.Tensor):
            label = names[n] if not hasattr(value, "items") and n < len(names) else key
            arrays[f"{prefix}.{label}"] = _array(item)


def record(model, *inputs, path="io.npz", layouts=None, modules=None, **keyword_inputs):
    """Run `model(*inputs, **keyword_inputs)` once and write what went through it.

    Args:
      model: a `torch.nn.Module`; call `.eval()` first, it runs in the mode it is in.
      path: of the npz file, written whole or not at all.
      layouts: {array name: axes} over the guesses, as `{"act.blocks.0": "NHWC"}`. Convolutional
        modules are taken to have channels second, linear ones and normalizations of tokens last;
        arrays of other modules follow what they contain.
      modules: names of the modules to record; all by default.

    Returns: names of the arrays written.
    """
    import torch

    calls = {}
    layout = {}
    order = []
    handles = []

    def watch(name, module):
        kinds = {type(m).__name__ for m in module.modules()}
        convolutional = any(k.startswith(("Conv", "BatchNorm")) or "Pool" in k for k in kinds)
        last = not convolutional and any(k in _CHANNELS_LAST for k in kinds)

        def hook(_, args, output):
            tensor = _first_tensor(output)
            if tensor is None:
                return
            order.append((name, len(calls.setdefault(name, []))))
            # A copy, since a later in-place activation would write into it.
            calls[name].append(_array(tensor))
            channels_last = last
            given = _first_tensor(args)
            if not convolutional and not last and given is not None:
                channels_last = known_last.get(given.data_ptr(), False)
            known_last[tensor.data_ptr()] = channels_last
            alive.append(tensor)  # or its address might come again with another layout
            layout[name] = axes(tuple(tensor.shape), channels_last)

        handles.append(module.register_forward_hook(hook))

    known_last, alive = {}, []
    for name, module in model.named_modules():
        if name and (modules is None or name in modules):
            watch(name, module)
    arrays = {}
    parameters = [
        p.name
        for p in inspect.signature(model.forward).parameters.values()
        if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    _named("in", inputs, arrays, parameters)
    _named("in", keyword_inputs, arrays)
    try:
        with torch.no_grad():
            output = model(*inputs, **keyword_inputs)
    finally:
        for handle in handles:
            handle.remove()
    _named("out", output, arrays)
    named = {key: axes(value.shape) for key, value in arrays.items()}
    for name, call in order:
        suffix = f"#{call + 1}" if len(calls[name]) > 1 else ""
        key = f"act.{name}{suffix}"
        arrays[key] = calls[name][call]
        named[key] = layout[name]
    unknown = sorted(set(layouts or {}) - set(named))
    if unknown:
        raise ValueError(f"layouts names arrays that were not recorded: {unknown}")
    named.update(layouts or {})
    arrays["layout"] = np.array(json.dumps(named))
    path = os.fspath(path)
    handle, temporary = tempfile.mkstemp(dir=os.path.dirname(path) or ".", suffix=".npz")
    try:
        with os.fdopen(handle, "wb") as file:
            np.savez(file, **arrays)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
    return list(arrays)
